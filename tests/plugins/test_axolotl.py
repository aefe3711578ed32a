"""The plugin against axolotl's interface as 0.19.0 has it; bench/trainers/axolotl_plugin.py runs axolotl itself."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import Dataset

from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.run import prepared_rows


@dataclass
class TrainDatasetMeta:
    train_dataset: Any
    eval_dataset: Any = None
    total_num_steps: int | None = None


class Settings(dict[str, Any]):
    """axolotl's DictDefault: a missing key is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    rows = Dataset.from_list([{"input_ids": [1, 2, j], "labels": [-100, 2, j]} for j in range(10)])
    contents = {
        "axolotl": {},
        "axolotl.integrations": {},
        "axolotl.integrations.base": {"BasePlugin": object},
        "axolotl.common": {},
        "axolotl.common.datasets": {
            "TrainDatasetMeta": TrainDatasetMeta,
            "load_datasets": lambda *, cfg: TrainDatasetMeta(rows, None, 10),
        },
        "axolotl.utils": {},
        "axolotl.utils.trainer": {"calculate_total_num_steps": lambda cfg, rows: len(rows)},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "tsqlora.plugins.axolotl", raising=False)
    found = {"findings": [{"name": "empty_answer", "places": [2, 3]}, {"name": "duplicate", "places": [5]}]}
    monkeypatch.setattr(prepared_rows, "audit_prepared", lambda *_, **__: found)
    from tsqlora.plugins.axolotl import Plugin

    yield Plugin()
    sys.modules.pop("tsqlora.plugins.axolotl", None)


def settings(folder: Path, **values: Any) -> Settings:
    return Settings(base_model="model", output_dir=str(folder), **values)


def test_rows_of_named_findings_are_left_out_and_steps_are_counted_again(plugin: Any, tmp_path: Path) -> None:
    cfg = settings(tmp_path, tsqlora={"drop": ["empty_answer"]}, total_num_tokens=30)
    plugin.register(cfg)
    meta = plugin.load_datasets(cfg)
    assert [row["input_ids"][2] for row in meta.train_dataset] == [0, 1, 4, 5, 6, 7, 8, 9]
    assert meta.total_num_steps == 8
    assert cfg.total_num_tokens is None


def test_without_a_block_the_rows_stay(plugin: Any, tmp_path: Path) -> None:
    meta = plugin.load_datasets(settings(tmp_path))
    assert (len(meta.train_dataset), meta.total_num_steps) == (10, 10)


def test_a_finding_that_does_not_exist_and_preferences_are_refused(plugin: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="empty_answer"):
        plugin.register(settings(tmp_path, tsqlora={"drop": ["empty_answers"]}))
    with pytest.raises(UnsupportedError, match="dpo"):
        plugin.load_datasets(settings(tmp_path, rl="dpo"))
