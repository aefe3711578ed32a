"""`tsqlora export` and `doctor` as scripts see them, on a run of ours and on any adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kinds import bert_classifier
from loras import lora_config, save_base, save_lora, tiny_llama
from runs import make_rows, set_up
from tsqlora.adapter.files import CONFIG, WEIGHTS, read_adapter
from tsqlora.settings import load_config
from tsqlora.training.command import train
from tsqlora.training.job import open_run

Run = Callable[..., tuple[int, str, str]]
CUT = ("export", "--format", "peft")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the whole method on a tiny BERT, whose ranks differ and of which a layer may have none."""
    folder = set_up(tmp_path_factory.mktemp("adapters"), labels=("no", "yes"), ranks={"min": 0})
    train(load_config(folder / "c.yaml"), folder / "run")
    return folder / "run"


def logits_of(model: Any, run: Path) -> Tensor:
    """Logits of some rows that the run was not trained on."""
    tokenizer = AutoTokenizer.from_pretrained(run.parent / "model")
    rows = tokenizer([row["text"] for row in make_rows(6, seed=9)], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**rows).logits.cpu()


def test_our_own_runs_universal_adapter_says_the_same_in_plain_peft(run: Path, tmp_path: Path, tsqlora: Run) -> None:
    assert len({target.rank for target in read_adapter(run / "adapter").targets.values()}) > 1
    code, out, _ = tsqlora("export", run, "--format", "universal", "--out", tmp_path / "u", "--json")
    report = json.loads(out)
    assert (code, report["rank"], report["update_difference"]) == (0, 8, 0.0)
    assert report["logits_difference"] < 1e-4 * max(report["largest_logit"], 1)
    base = AutoModelForSequenceClassification.from_pretrained(run.parent / "model", num_labels=2)
    exported = PeftModel.from_pretrained(base, str(tmp_path / "u"))
    torch.testing.assert_close(logits_of(exported, run), logits_of(open_run(run).model, run), rtol=1e-4, atol=1e-4)


def test_a_merged_run_is_a_model_and_a_tokenizer(run: Path, tmp_path: Path, tsqlora: Run) -> None:
    code, out, err = tsqlora("export", run, "--format", "merged", "--out", tmp_path / "m", "--json")
    assert (code, json.loads(out)["format"]) == (0, "merged")
    assert "this classifier is served as it is by PEFT, vLLM" in err
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits_of(merged, run), logits_of(open_run(run).model, run), rtol=1e-4, atol=1e-4)
    assert merged.config.id2label == {0: "no", 1: "yes"}
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "m", run.parent / "model")]
    assert tokenizers[0]("good day").input_ids == tokenizers[1]("good day").input_ids
    assert not (tmp_path / "m" / CONFIG).exists()
    assert "fine-tuned on train.jsonl" in (tmp_path / "m" / "README.md").read_text(encoding="utf-8")


def test_what_a_run_is_not_made_into_is_named(run: Path, tmp_path: Path, tsqlora: Run) -> None:
    for command, named in (
        (("export", run, "--format", "gguf"), "classifier"),
        (("export", run, "--format", "merged", "--base", "other"), "--base"),
        ((*CUT, run, "--by", "size"), "removed"),
        ((*CUT, run, "--mean-rank", 1), "--keep SHARE"),
        ((*CUT, run, "--keep", 2), "--keep 2"),
    ):
        code, out, err = tsqlora(*command, "--out", tmp_path / "x")
        assert (code, out) == (2, "")
        assert named in err


def test_a_run_is_cut_to_a_share_of_its_parameters(run: Path, tmp_path: Path, tsqlora: Run) -> None:
    before = read_adapter(run / "adapter")
    half = before.parameters / 2
    for format, out in (("peft", tmp_path / "out"), ("compressed", tmp_path / "old")):
        code, text, _ = tsqlora("export", run, "--format", format, "--keep", 0.5, "--out", out, "--json")
        assert (code, json.loads(text)["format"]) == (0, format)
        assert 0.8 * half < read_adapter(out).parameters <= half


def test_the_doctor_sees_the_adapter_of_a_run(run: Path, tsqlora: Run) -> None:
    code, out, _ = tsqlora("doctor", run, "--json")
    report = json.loads(out)
    assert (code, report["adapter"]) == (0, str(run / "adapter"))
    assert report["heads"] == ["classifier"]
    mends = {result["name"]: result["mend"] for result in report["consumers"]}
    assert (mends["vLLM"], mends["vLLM to 0.30"]) == (None, "merged")


def test_the_doctor_ends_well_whatever_it_found_and_with_3_where_it_cannot_read(tmp_path: Path, tsqlora: Run) -> None:
    broken = save_lora(tmp_path / "broken", tiny_llama(), lora_config(use_rslora=True, rank_pattern={"k_proj": 3}))
    settings = json.loads((broken / CONFIG).read_text())
    (broken / CONFIG).write_text(json.dumps(settings | {"use_dora": True, "alpha_pattern": {"k_proj": 1}}))
    assert tsqlora("doctor", broken)[0] == 0
    (broken / WEIGHTS).rename(broken / "adapter_model.bin")
    code, out, err = tsqlora("doctor", broken)
    assert (code, out) == (3, "")
    assert "a pickle, which can run code and is not opened" in err
    assert len(err.strip().splitlines()) <= 2
    assert tsqlora("doctor", tmp_path / "nowhere")[0] == 3


@pytest.mark.parametrize(
    ("server", "code", "verdict"), [("vllm", 0, "right"), ("vllm==0.31.0", 4, "wrong"), ("sglang", 4, "refused")]
)
def test_the_doctor_of_one_server_exits_by_its_verdict(
    server: str, code: int, verdict: str, tmp_path: Path, tsqlora: Run
) -> None:
    source = save_lora(tmp_path / "a b", tiny_llama(), lora_config(rank_pattern={"k_proj": 3}))
    result, out, err = tsqlora("doctor", source, "--server", server, "--json")
    (judged,) = json.loads(out)["consumers"]
    assert (result, judged["verdict"]) == (code, verdict)
    assert (f"tsqlora export '{source}' --format universal" in err) == (code == 4)
    assert tsqlora("doctor", tmp_path / "nowhere", "--server", server)[0] == 3
    assert tsqlora("doctor", source, "--server", "vlm")[0] == 2


@pytest.mark.parametrize(("server", "format"), [("sglang", "universal"), ("llama.cpp", "gguf"), ("peft", "peft")])
def test_an_export_for_a_server_has_the_format_that_it_reads(
    server: str, format: str, tmp_path: Path, tsqlora: Run
) -> None:
    save_base(tmp_path / "base", tiny_llama())
    source = save_lora(tmp_path / "a", tiny_llama(), lora_config(rank_pattern={"k_proj": 3}))
    arguments = ("export", source, "--base", tmp_path / "base", "--out", tmp_path / "out", "--json")
    code, out, _ = tsqlora(*arguments, "--server", server)
    assert (code, json.loads(out)["format"]) == (0, format)
    assert tsqlora(*arguments)[0] == 2
    assert tsqlora(*arguments, "--server", server, "--format", format)[0] == 2


def test_gguf_of_a_classifier_says_in_one_line_who_serves_it(tmp_path: Path, tsqlora: Run) -> None:
    code, _, err = tsqlora("export", bert_classifier(tmp_path), "--format", "gguf", "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "as it is by PEFT, vLLM; with --format merged by SGLang" in err
    assert "llama.cpp cannot load classifier adapters" in err
    code, _, err = tsqlora("export", tmp_path / "a", "--format", "foo", "--out", tmp_path / "out")
    assert (code, err.startswith("error: --format foo: ")) == (2, True)


def test_the_doctor_proposes_no_export_that_peft_cannot_make(tmp_path: Path, tsqlora: Run) -> None:
    source = save_lora(tmp_path / "a", tiny_llama(), lora_config(alora_invocation_tokens=[1, 2]))
    code, _, err = tsqlora("doctor", source, "--server", "vllm")
    assert (code, "--format" in err) == (4, False)
    assert tsqlora("export", source, "--server", "vllm", "--out", tmp_path / "out")[0] == 2


def test_doctor_and_export_take_an_adapter_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tsqlora: Run
) -> None:
    repository = tmp_path / "cache" / "models--somebody--adapter"
    save_lora(repository / "snapshots" / ("a" * 40), tiny_llama(), lora_config())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert json.loads(tsqlora("doctor", "somebody/adapter", "--json")[1])["rank"] == 8
    save_base(tmp_path / "base", tiny_llama())
    arguments = ("export", "somebody/adapter", "--base", tmp_path / "base")
    for chosen, out in (("--format", "universal"), tmp_path / "u"), (("--server", "sglang"), tmp_path / "s"):
        code, _, err = tsqlora(*arguments, *chosen, "--out", out)
        assert (code, (out / WEIGHTS).is_file()) == (0, True), err
    code, out, err = tsqlora("doctor", "somebody/else")
    assert (code, out) == (3, "")
    assert "somebody/else" in err
    next(repository.glob(f"snapshots/*/{WEIGHTS}")).unlink()
    code, _, err = tsqlora("doctor", "somebody/adapter")
    assert (code, "somebody/adapter" in err, "pickle" in err) == (3, True, True)
