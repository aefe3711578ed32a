"""Code that lies in a model's folder does not run through any door, also where the terminal says yes."""

import ast
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import LlamaConfig

import tsqlora as tsq
from families import FAMILIES, tokenizer_of
from loras import lora_config, save_lora, tiny_llama
from made_runs import make_run
from runs import make_rows, write_jsonl
from tsqlora.errors import TsqLoraError

SOURCE = Path(tsq.__file__).parent
KINDS = ["AutoConfig", "AutoModel", "AutoImageProcessor", "AutoFeatureExtractor", "AutoProcessor"]
KINDS += [f"AutoModelFor{of}" for of in ("CausalLM", "SequenceClassification", "ImageClassification", "Seq2SeqLM")]


def evil(base: Path, kind: str) -> Path:
    """A folder with a model whose code writes a file beside it: of its config, of its tokenizer, or of its class."""
    code = {"auto_map": dict.fromkeys(KINDS, "evil.C")}
    tokenizer = tokenizer_of(FAMILIES["qwen 2.5"])
    tokenizer.save_pretrained(base)
    (base / "evil.py").write_text(f"open({str(base / 'ran')!r}, 'w')\nclass C: pass\n")
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1).save_pretrained(base)
    changes: dict[str, dict[str, Any]] = {
        "config": {"config.json": {"model_type": "evil", **code}, "preprocessor_config.json": code},
        "tokenizer": {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.C", "evil.C"]}}},
        "class": {"config.json": {"model_type": "vit", **code}},
    }
    changes["tokenizer"]["tokenizer_config.json"]["tokenizer_class"] = "Evil"
    for name, values in changes[kind].items():
        path = base / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    return base


DOORS: dict[str, str] = {
    "audit of chats": "audit {chats} --model {base} --out {out}",
    "audit of labels": "audit {labels} --model {base} --out {out}",
    "audit of a prepared set": "audit --prepared {made} --model {base} --out {out}",
    "plan": "train --model {base} --data {chats} --dry-run --set task.type=causal-lm",
    "plan of labels": "train --model {base} --data {labels} --dry-run",
    "train": "train --model {base} --data {chats} --out {out} --set task.type=causal-lm",
    "continue an adapter": "train --model {base} --data {chats} --set adapter.init_from={lora} --dry-run "
    "--set task.type=causal-lm",
    "look": "look {labels} --model {base} --out {out}",
    "look at chats": "look {chats} --model {base} --out {out} --set task.type=causal-lm",
    "score": "score {run} --out {out}.parquet",
    "predict": "predict {run} --data {labels} --out {out}.jsonl",
    "evaluate": "evaluate {run} --data {chats}",
    "export": "export {run} --format merged --out {out}",
    "export of an adapter": "export {lora} --format merged --base {base} --out {out}",
    "export for llama.cpp": "export {lora} --format gguf --base {base} --out {out}.gguf",
    "doctor": "doctor {lora}",
    "doctor of a template": "doctor {lora} --template {jinja} --prepared {made}",
    "check": "check {run} --server-url http://127.0.0.1:9",
}


FEW = ("audit of chats", "audit of labels", "plan", "export of an adapter")
CASES = [*product(["config"], DOORS), *product(["tokenizer", "class"], FEW)]


@pytest.fixture(scope="module", params=["config"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("nobody")
    base = evil(folder / "base", request.param)
    turns = [{"role": "user", "content": "How far?"}, {"role": "assistant", "content": "Far."}]
    chats = write_jsonl(folder / "chats.jsonl", [{"messages": turns}] * 20)
    labels = write_jsonl(folder / "labels.jsonl", make_rows(40))
    Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}] * 4).save_to_disk(folder / "made")
    lora = save_lora(folder / "lora", tiny_llama(), lora_config())
    settings = json.loads((lora / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    run = make_run(folder, task="causal-lm", labels=None)
    (run / "config.yaml").write_text(
        f"model: {{path: {base}}}\ndata: {{train: {chats}}}\ntask: {{type: causal-lm}}\nranks: {{policy: fixed}}\n"
    )
    (run / "adapter").symlink_to(lora)
    (folder / "a.jinja").write_text("{{ messages[0].content }}")
    return {
        "base": base,
        "chats": chats,
        "labels": labels,
        "made": folder / "made",
        "lora": lora,
        "run": run,
        "jinja": folder / "a.jinja",
    }


@pytest.fixture(autouse=True)
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")


@pytest.mark.parametrize(("place", "door"), CASES, indirect=["place"])
def test_no_command_runs_the_code_of_a_model(
    door: str, place: dict[str, Path], tmp_path: Path, tsqlora: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = tsqlora(*(word.format(out=tmp_path / "out", **place) for word in DOORS[door].split()))
    assert not (place["base"] / "ran").exists()
    assert code < 5, err
    assert "Traceback" not in err


def test_no_function_runs_the_code_of_a_model(place: dict[str, Path], tmp_path: Path) -> None:
    settings = {"model": {"path": str(place["base"])}, "data": {"train": str(place["chats"])}}
    with pytest.raises(TsqLoraError):
        tsq.train(settings, out=tmp_path / "out")
    assert not (place["base"] / "ran").exists()


def test_the_code_runs_where_the_user_trusts_it(
    tmp_path: Path, place: dict[str, Path], tsqlora: Callable[..., tuple[int, str, str]]
) -> None:
    base = evil(tmp_path / "base", "config")
    refused = ("audit", place["chats"], "--model", base, "--out", tmp_path / "out")
    assert "model.trust_remote_code" in tsqlora(*refused)[2]
    tsqlora(*refused, "--set", "model.trust_remote_code=true")
    assert (base / "ran").exists()


def test_only_libs_loads_models() -> None:
    loaders = {"from_pretrained", "from_config"}
    calls = [
        f"{path.relative_to(SOURCE)}:{node.lineno}"
        for path in SOURCE.rglob("*.py")
        if path.parent.name != "libs"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in loaders
    ]
    assert not calls, "load with tsqlora.libs.transformers.load, which runs no code of the model"
