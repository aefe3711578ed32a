"""Examples for axolotl and LLaMA-Factory, each against its trainer's interface as 0.19.0 and 0.9.5 have it.

bench/trainers/axolotl_plugin.py runs axolotl itself.
"""

import importlib
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import LlamaConfig

import tsqlora as tsq
from families import FAMILIES, tokenizer_of
from masked import chats, masked
from tsqlora.auditing.texts.findings import OF_LABELS
from tsqlora.cli import main

ROWS, EMPTY, COPY = 24, (2, 3), 5
LEFT = [j for j in range(ROWS) if j not in (*EMPTY, COPY)]
FOLDER = Path(__file__).parents[1] / "examples"
LLAMA_FACTORY = {
    "data": """
        from datasets import load_from_disk
        def get_template_and_fix_tokenizer(tokenizer, data): return "template"
        def get_dataset(template, model, data, training, stage, tokenizer):
            load_from_disk(data["made"]).save_to_disk(data["tokenized_path"])
            raise SystemExit(0)
        """,
    "hparams": "def get_train_args(settings): return (settings,) * 5",
    "model": "def load_tokenizer(model): return {'tokenizer': None}",
    "train.tuner": """
        import json
        def run_exp(settings): print(json.dumps(settings))
        """,
}


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


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that the examples start runs here: a process of its own would import everything again."""

    def run(command: list[str], *, check: bool = False) -> subprocess.CompletedProcess[str]:
        python, *words = command
        assert (python, words[:2]) == (sys.executable, ["-m", "tsqlora"])
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            with pytest.raises(SystemExit) as ended:
                main()
        done = subprocess.CompletedProcess[str](command, int(ended.value.code or 0))
        if check:
            done.check_returncode()
        return done

    monkeypatch.setattr(subprocess, "run", run)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer and a config, without weights."""
    folder, tokenizer = str(tmp_path_factory.mktemp("model")), tokenizer_of(FAMILIES["qwen 2.5"])
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made() -> Dataset:
    """Chats as a trainer prepares them; two have an empty answer, and one is a copy."""
    tokenizer, rows = tokenizer_of(FAMILIES["qwen 2.5"]), chats(ROWS)
    for j in EMPTY:
        rows[j] = [*rows[j][:-1], {"role": "assistant", "content": ""}]
    rows[COPY] = rows[0]
    return Dataset.from_list([masked(tokenizer, row, "all turns") for row in rows])


@pytest.fixture
def axolotl(made: Dataset, monkeypatch: pytest.MonkeyPatch) -> Any:
    contents = {
        "axolotl": {},
        "axolotl.integrations": {},
        "axolotl.integrations.base": {"BasePlugin": object},
        "axolotl.common": {},
        "axolotl.common.datasets": {
            "TrainDatasetMeta": TrainDatasetMeta,
            "load_datasets": lambda *, cfg: TrainDatasetMeta(made, None, ROWS),
        },
        "axolotl.utils": {},
        "axolotl.utils.trainer": {"calculate_total_num_steps": lambda cfg, rows: len(rows)},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "axolotl_plugin", raising=False)
    module = importlib.import_module("axolotl_plugin")
    del sys.modules["axolotl_plugin"]
    return module


def test_axolotl_leaves_out_rows_of_named_findings_and_counts_steps_again(
    axolotl: Any, made: Dataset, model: str, tmp_path: Path
) -> None:
    plugin, block = axolotl.TsqloraPlugin(), {"drop": ["empty_answer", "duplicate"]}
    cfg = Settings(base_model=model, output_dir=str(tmp_path / "out"), tsqlora=block, total_num_tokens=30)
    plugin.register(cfg)
    assert axolotl.Args(**cfg).tsqlora.drop == block["drop"]
    meta = plugin.load_datasets(cfg)
    assert meta.train_dataset["input_ids"][:] == made.select(LEFT)["input_ids"][:]
    assert (meta.total_num_steps, cfg.total_num_tokens) == (len(LEFT), None)
    assert {path.name for path in (tmp_path / "out" / "tsqlora").iterdir()} >= {"ledger.parquet", "audit.html"}
    whole = plugin.load_datasets(Settings(base_model=model, output_dir=str(tmp_path / "whole")), preprocess=True)
    assert (len(whole.train_dataset), whole.total_num_steps) == (ROWS, ROWS)
    assert (tmp_path / "whole" / "tsqlora-preprocess").is_dir()


def test_axolotl_refuses_findings_that_no_row_can_have_preferences_and_several_processes(
    axolotl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = axolotl.TsqloraPlugin()
    for name in ("empty_answers", "roles", "eval_leak", "cut_answer"):
        with pytest.raises(tsq.SettingsError, match=name):
            plugin.register(Settings(tsqlora={"drop": [name]}))
    plugin.register(Settings(tsqlora={"drop": ["cut_answer"], "answers": True}))
    with pytest.raises(tsq.UnsupportedError, match="dpo"):
        plugin.load_datasets(Settings(rl="dpo"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(tsq.SettingsError, match="axolotl preprocess"):
        plugin.load_datasets(Settings())


@pytest.fixture
def llama_factory(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the example on rows that LLaMA-Factory's interface prepares, with further words: code, stdout, stderr."""
    for name, text in LLAMA_FACTORY.items():
        file = tmp_path / "installed" / "llamafactory" / f"{name.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text("\n".join(line.removeprefix(" " * 8) for line in text.splitlines()))
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    monkeypatch.chdir(tmp_path)

    def run(rows: Any, *words: str, **settings: Any) -> tuple[int, str, str]:
        rows.save_to_disk(str(tmp_path / "made"))
        settings = {"stage": "sft", "model_name_or_path": model, "made": str(tmp_path / "made")} | settings
        (tmp_path / "sft.yaml").write_text(json.dumps(settings))
        monkeypatch.setattr(sys, "argv", ["llama_factory.py", "sft.yaml", "--out", "run", *words])
        for name in [name for name in sys.modules if name.partition(".")[0] == "llamafactory"]:
            del sys.modules[name]
        capfd.readouterr()
        code: Any = 0
        try:
            runpy.run_path(str(FOLDER / "llama_factory.py"), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        seen = capfd.readouterr()
        return (1, seen.out, code) if isinstance(code, str) else (code or 0, seen.out, seen.err)

    return run


def test_llama_factory_trains_on_the_rows_without_named_findings(
    llama_factory: Any, made: Dataset, tmp_path: Path
) -> None:
    parts = DatasetDict({"train": made, "validation": made.select([0])})
    code, out, err = llama_factory(parts, "--drop-findings", "empty_answer, duplicate", learning_rate=1e-4)
    assert code == 0, err[-3000:]
    settings = json.loads(out.splitlines()[-1])
    assert (settings["tokenized_path"], settings["learning_rate"]) == (str(Path("run", "filtered")), 1e-4)
    filtered: Any = load_from_disk(str(tmp_path / "run" / "filtered"))
    assert filtered["train"]["input_ids"][:] == made.select(LEFT)["input_ids"][:]
    assert len(filtered["validation"]) == 1
    assert (tmp_path / "run" / "audit" / "audit.html").exists()
    for words, settings, named in (
        ((), {}, "run is not empty"),
        (("--drop-findings", "cut_answer", "--out", "new"), {}, "'cut_answer'"),
        (("--out", "new"), {"stage": "dpo"}, "stage: sft"),
        (("--out", "new"), {"tokenized_path": "saved"}, "tokenized_path"),
    ):
        code, _, err = llama_factory(made, *words, **settings)
        assert (code, named in err) == (2, True)
    assert not (tmp_path / "new").exists()


def test_llama_factorys_packed_row_is_left_out_whole_and_padding_is_no_sequence(
    llama_factory: Any, tmp_path: Path
) -> None:
    prompt, answer = [9, 10, 11], [12, 13, tokenizer_of(FAMILIES["qwen 2.5"]).eos_token_id]
    faults = [[False] * 3, [False, True, False], [True, True, False], [False] * 3, [False] * 3]
    rows = [
        {
            "input_ids": [*[*prompt, j, *answer] * 3, 0, 0],
            "position_ids": [*[*range(7)] * 3, 0, 0],
            "attention_mask": [1] * 23,
            "labels": [token for bad in some for token in [-100] * 4 + ([-100] * 3 if bad else answer)] + [-100] * 2,
        }
        for j, some in enumerate(faults, start=20)
    ]
    code, out, err = llama_factory(Dataset.from_list(rows), "--drop-findings", "nothing_trained", "--no-train")
    assert code == 0, err[-3000:]
    assert "2 of 5 rows are left out whole, for 3 of their sequences" in out
    filtered: Any = load_from_disk(str(tmp_path / "run" / "filtered"))
    assert [row["input_ids"][3] for row in filtered] == [20, 23, 24]
    code, _, err = llama_factory(Dataset.from_list(rows[:3]), "--drop-findings", "nothing_trained", "--out", "most")
    assert (code, "without packing" in err) == (1, True)


@pytest.mark.parametrize("name", ["axolotl_plugin", "llama_factory"])
def test_the_examples_name_the_findings_that_rows_of_one_answer_can_have(
    name: str, axolotl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = axolotl if name == "axolotl_plugin" else importlib.import_module(name)
    of_pairs = {one for one in OF_LABELS if "pair" in one}
    assert {*example.OF_TOKENS, *example.OF_ANSWERS} == OF_LABELS - of_pairs - {"eval_leak"}
