"""The page of a text audit in a real browser: findings open their rows, keys drop them, and the table has them."""

import csv
import io
import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from browser import Page, axe
from families import FAMILIES, tokenizer_of
from tsqlora.auditing.texts.command import audit_text

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> " + "long" * 90
OPEN = "document.querySelectorAll('details').forEach(fold => fold.open = true)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text page")
    tokenizer = tokenizer_of(FAMILIES["qwen 2.5"])
    tokenizer.save_pretrained(folder / "model")
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=700, eos_token_id=tokenizer.eos_token_id)
    config.save_pretrained(folder / "model")
    answers = [
        HOSTILE,
        " ",
        "It is far. " * 90,
        "Text<|im_end|>",
        "caf\u00c3\u00a9",
        *[f"{j} hours away." for j in range(6)],
    ]
    rows = [
        {"messages": [{"role": "user", "content": f"How far is town {j}?"}, {"role": "assistant", "content": answer}]}
        for j, answer in enumerate([*answers, answers[-1]])
    ]
    rows[-1]["messages"][0]["content"] = rows[-2]["messages"][0]["content"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    audit_text(str(folder / "rows.jsonl"), model=str(folder / "model"), out=folder / "audit")
    return folder / "audit" / "audit.html"


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_fails_overflows_or_is_requested(page: Path, tab: Page, width: int, dark: bool) -> None:
    tab.messages.clear()
    tab.requests.clear()
    tab.open(page, width=width, dark=dark)
    tab.run(OPEN)
    assert (tab.messages, tab.requests) == ([], [page.as_uri()])
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run("window.hacked") is None
    names = tab.run("[...document.querySelectorAll('.finding')].map(fold => fold.dataset.name)")
    assert {*names} >= {"template_twice", "answer_cut", "empty_answer", "duplicate", "broken_characters"}


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_has_no_accessibility_violations(page: Path, tab: Page, width: int, dark: bool) -> None:
    script = axe()
    tab.open(page, width=width, dark=dark)
    tab.run(OPEN)
    tab.run(f"{script}; 0")
    assert tab.run("axe.run().then(r => r.violations.map(v => v.id + v.nodes.map(n => n.html)))") == []


def test_a_row_is_its_tokens_and_the_table_has_what_keys_dropped(page: Path, tab: Page) -> None:
    tab.open(page, width=1440)
    tab.run("localStorage.clear()")
    tab.open(page, width=1440)
    tab.run("document.querySelectorAll('.finding').forEach(one => one.open = one.dataset.name === 'template_twice')")
    row = "document.querySelector('.finding[data-name=template_twice] .rows > li')"
    tab.run("new Promise(done => setTimeout(done, 50))")
    assert tab.run(f"[...{row}.querySelectorAll('.t')].map(span => span.textContent).join('')") == "Text<|im_end|>"[:4]
    key = "new KeyboardEvent('keydown', {key: 'd', bubbles: true})"
    tab.run(f"{row}.focus(); document.activeElement.dispatchEvent({key})")
    saved = "new Promise(done => { URL.createObjectURL = (blob) => { blob.text().then(done); return '#'; };"
    table = tab.run(f"{saved} document.getElementById('export').click(); }})")
    dropped = [row["row"] for row in csv.DictReader(io.StringIO(table)) if row["reviewed"] == "drop"]
    assert dropped == ["3"]
