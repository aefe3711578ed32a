"""The demo on chats, with a tiny model in place of SmolLM2, whose package few machines have."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from families import FAMILIES, trained_tokenizer
from words import llama

SCRIPT = Path(__file__).parents[1] / "scripts" / "demo_text.py"


@pytest.mark.filterwarnings("ignore")
def test_the_demo_moves_answers_and_says_how_many_it_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in SCRIPT.with_name("demo_chats.jsonl").read_text().splitlines()]
    texts = [message["content"] for row in rows for message in row["messages"]]
    assert len({*texts}) == len(texts) == 240
    tokenizer = trained_tokenizer(FAMILIES["qwen 2.5"], texts, 1_000)
    config = llama().config
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 256
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    type(llama())(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(
        sys, "argv", ["demo_text.py", "--out", str(tmp_path / "out"), "--model", str(tmp_path / "model")]
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
    output = " ".join(capsys.readouterr().out.split())
    assert "0 listed, 0 of the 12 planted ones" in output
    assert "Your own file: tsqlora audit" in output
    chats = [json.loads(line) for line in (tmp_path / "out" / "chats.jsonl").read_text().splitlines()]
    assert [chat["messages"][1] == row["messages"][1] for chat, row in zip(chats, rows, strict=True)].count(False) == 20
