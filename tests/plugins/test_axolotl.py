"""The plugin against axolotl's interface as 0.19.0 has it; bench/trainers/axolotl_plugin.py runs axolotl itself."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import Dataset
from transformers import LlamaConfig

from families import FAMILIES, tokenizer_of
from masked import chats, masked
from tsqlora.errors import SettingsError, UnsupportedError

ROWS, EMPTY, COPY = 24, (2, 3), 5


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
    tokenizer, rows = tokenizer_of(FAMILIES["qwen 2.5"]), chats(ROWS)
    for j in EMPTY:
        rows[j] = [*rows[j][:-1], {"role": "assistant", "content": ""}]
    rows[COPY] = rows[0]
    rows = Dataset.from_list([masked(tokenizer, row, "all turns") for row in rows])
    contents = {
        "axolotl": {},
        "axolotl.integrations": {},
        "axolotl.integrations.base": {"BasePlugin": object},
        "axolotl.common": {},
        "axolotl.common.datasets": {
            "TrainDatasetMeta": TrainDatasetMeta,
            "load_datasets": lambda *, cfg: TrainDatasetMeta(rows, None, ROWS),
        },
        "axolotl.utils": {},
        "axolotl.utils.trainer": {"calculate_total_num_steps": lambda cfg, rows: len(rows)},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "tsqlora.plugins.axolotl", raising=False)
    from tsqlora.plugins.axolotl import Plugin

    yield Plugin()
    sys.modules.pop("tsqlora.plugins.axolotl", None)


def settings(folder: Path, **values: Any) -> Settings:
    tokenizer = tokenizer_of(FAMILIES["qwen 2.5"])
    tokenizer.save_pretrained(folder / "model")
    LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder / "model")
    return Settings(base_model=str(folder / "model"), output_dir=str(folder / "out"), **values)


def test_rows_of_named_findings_are_left_out_and_steps_are_counted_again(plugin: Any, tmp_path: Path) -> None:
    cfg = settings(tmp_path, tsqlora={"drop": ["empty_answer", "duplicate"]}, total_num_tokens=30)
    whole = plugin.load_datasets(settings(tmp_path / "whole")).train_dataset
    plugin.register(cfg)
    meta = plugin.load_datasets(cfg)
    left = [j for j in range(ROWS) if j not in (*EMPTY, COPY)]
    assert meta.train_dataset["input_ids"][:] == whole.select(left)["input_ids"][:]
    assert meta.total_num_steps == len(left)
    assert cfg.total_num_tokens is None


def test_without_a_block_the_rows_stay(plugin: Any, tmp_path: Path) -> None:
    meta = plugin.load_datasets(settings(tmp_path))
    assert (len(meta.train_dataset), meta.total_num_steps) == (ROWS, ROWS)


def test_a_finding_that_does_not_exist_and_preferences_are_refused(plugin: Any, tmp_path: Path) -> None:
    for block in ({"drop": ["empty_answers"]}, {"drop": ["roles"]}, {"drop": ["eval_leak"]}, {"drop": ["cut_answer"]}):
        with pytest.raises(SettingsError, match=block["drop"][0]):
            plugin.register(settings(tmp_path, tsqlora=block))
    plugin.register(settings(tmp_path, tsqlora={"drop": ["cut_answer"], "answers": True}))
    with pytest.raises(UnsupportedError, match="dpo"):
        plugin.load_datasets(settings(tmp_path, rl="dpo"))
