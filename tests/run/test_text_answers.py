"""Which models read answers, and what is said before they do."""

import csv
import json
import shutil
from pathlib import Path
from string import ascii_letters

import numpy as np
import pytest

from families import FAMILIES, tokenizer_of
from text.test_before import FOREIGN_ROWS, ROWS, Repeats
from tsqlora.run import text_audit
from tsqlora.run.text_audit import audit_text, no_judge
from words import llama


def test_a_model_without_weights_here_reads_no_answers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert no_judge(str(tmp_path)) == f"the weights of {tmp_path} are not on this machine"
    assert "not on this machine" in no_judge("someone/model")


def test_a_model_that_memory_cannot_hold_reads_no_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    assert no_judge(str(tmp_path)) == ""
    monkeypatch.setattr(text_audit, "MARGIN", shutil.disk_usage("/").total)
    assert "give --model a smaller one with the same tokenizer" in no_judge(str(tmp_path))


def test_an_audit_names_answers_of_other_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, config = tokenizer_of(FAMILIES["qwen 2.5"]), llama().config
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 200
    model = Repeats(config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(text_audit.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    rng = np.random.default_rng(0)
    words = [rng.permutation([*ascii_letters])[:8] for _ in range(ROWS)]
    with (tmp_path / "rows.jsonl").open("w") as file:
        for j, own in enumerate(words):
            answer = rng.permutation(words[j + 1] if j in FOREIGN_ROWS else own)
            contents = zip(("user", "assistant"), ("".join(own), "".join(answer)), strict=True)
            file.write(json.dumps({"messages": [{"role": a, "content": b} for a, b in contents]}) + "\n")
    told, out = list[str](), tmp_path / "audit"
    audit_text(str(tmp_path / "rows.jsonl"), model=str(tmp_path / "model"), out=out, tell=told.append)
    assert told == [f"reads {ROWS} answers of {ROWS} rows"]
    result = json.loads((out / "findings.json").read_text())
    (found,) = (one for one in result["findings"] if one["name"] == "foreign_answer")
    assert set(found["places"]) <= set(FOREIGN_ROWS)
    assert found["rows"] >= 0.7 * len(FOREIGN_ROWS)
    assert any(shift[2] == 1 for shift in result["answers"]["shifts"])
    suspects = [
        one
        for one in csv.DictReader((out / "suspects.csv").read_text().splitlines())
        if one["finding"] == "foreign_answer"
    ]
    assert min(float(one["probability"]) for one in suspects) > 0.5
    page = (out / "audit.html").read_text()
    assert "Answers that do not fit" in page
    shown = json.loads(page.partition('id="page-data">')[2].partition("</script>")[0])["rows"]
    assert "u" in shown[str(found["places"][0])]["parts"][0]["kinds"]
    assert "fits the prompt of row" in shown[str(found["places"][0])]["detail"]
