"""The page of an audit in a real browser: no error, no request, no overflow; keys review rows, which the table has."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from browser import Page, axe
from seen import Seen
from tsqlora.auditing.review_page import audit_page

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> " + "long" * 200
CURRENT = "document.querySelector('#rows [aria-current] .words').textContent"
SHOWN = "[...document.querySelectorAll('#rows > li .words')].map(p => p.textContent)"


def listed(row: int, text: str, label: str, other: str, *candidates: str, **about: Any) -> dict[str, Any]:
    """A line of an audit's listing."""
    one = {"row": row, "text": text, "label": label, "suggested_label": other, "candidates": candidates}
    rest: dict[str, Any] = {"wrong_probability": None, "kind": "suspect", "token": None, "word": "", "start": 0}
    return one | rest | {"near": None} | about


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    classes: list[str] = ["no", "yes", "=maybe", HOSTILE]
    rows = [
        listed(
            j,
            HOSTILE if j == 3 else f"text {j}",
            "no",
            "yes",
            "yes",
            "no",
            "=maybe",
            HOSTILE,
            wrong_probability=1 - j / 20,
            kind=kind,
            near={1: 3, 3: 1}.get(j),
        )
        for j, kind in enumerate(["suspect"] * 8 + ["check"] * 2)
    ]
    about: dict[str, Any] = {
        "source": "<b>rows</b>.csv", "sha256": "0" * 64, "classes": classes, "model_name": HOSTILE, "rows": 10,
        "summary": "Said.", "notes": [HOSTILE], "answer": "class", "columns": {},
        "evident": True, "pairs": [{"label": HOSTILE, "suggested": "no", "rows": 3, "wrong": 1.5}],
    }  # fmt: skip
    path = tmp_path_factory.mktemp("audit page") / "audit.html"
    path.write_text(audit_page(Path("a b"), about, rows), encoding="utf-8")
    return path


def press(tab: Page, *keys: str) -> None:
    for key in keys:
        tab.run(f"document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {{key: {key!r}, bubbles: true}}))")


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_fails_overflows_or_is_requested(page: Path, tab: Page, width: int, dark: bool) -> None:
    tab.messages.clear()
    tab.requests.clear()
    tab.open(page, width=width, dark=dark)
    assert (tab.messages, tab.requests) == ([], [page.as_uri()])
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run("window.hacked") is None
    assert HOSTILE in tab.run(SHOWN)


def test_the_page_has_no_accessibility_violations(page: Path, tab: Page) -> None:
    script = axe()
    tab.open(page, width=1440)
    tab.run(f"{script}; 0")
    assert tab.run("axe.run().then(r => r.violations.map(v => v.id + v.nodes.map(n => n.html)))") == []


def test_keys_go_through_the_rows_and_the_table_has_what_they_chose(page: Path, tab: Page) -> None:
    tab.open(page, width=1440)
    tab.run("localStorage.clear()")
    tab.open(page, width=1440)
    press(tab, "1", "j", "2", "j")  # a choice stays at its row
    assert tab.run(CURRENT) == "text 2"
    press(tab, "3", "j", "2", "u", "j", "t")
    tab.run("Object.assign(document.activeElement, {value: ' YES '})")
    press(tab, "Enter")
    expected = {"0": "no", "1": "yes", "2": "'=maybe", "4": "yes"}
    saved = "new Promise(done => { URL.createObjectURL = (blob) => { blob.text().then(done); return '#'; };"
    table = tab.run(f"{saved} document.getElementById('export').click(); }})")
    rows = {row["row"]: row for row in csv.DictReader(io.StringIO(table))}
    assert {row: cells["reviewed_label"] for row, cells in rows.items() if cells["reviewed_label"]} == expected
    assert rows["3"]["text"] == HOSTILE
    tab.open(page, width=1440)
    assert tab.run("document.getElementById('count').textContent").startswith("4 of 10"), "it is there after a reload"


@pytest.mark.parametrize(
    ("id", "value", "rows"),
    [
        ("search", "text 5", 1),
        ("state", "check", 2),
        ("state", "near", 2),
        ("state", "done", 0),
        ("pair", '["no","yes"]', 10),
    ],
)
def test_rows_are_searched_and_narrowed(id: str, value: str, rows: int, page: Path, tab: Page) -> None:
    tab.open(page, width=1440)
    tab.run("localStorage.clear()")
    tab.open(page, width=1440)
    event = "input" if id == "search" else "change"
    tab.run(
        f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event('{event}')); }})(document.getElementById('{id}'))"
    )
    assert len(tab.run(SHOWN)) == rows
    assert tab.run("document.getElementById('none').hidden") == (rows > 0)


def test_a_browser_stores_the_choices_of_each_label_column_apart() -> None:
    about: dict[str, Any] = {
        "source": "rows.csv", "sha256": "0" * 64, "classes": ["0", "1"], "model_name": "m", "rows": 10, "summary": "S.",
        "notes": [], "answer": "class", "evident": True, "pairs": [],
    }  # fmt: skip
    pages = [audit_page(Path("a"), about | {"columns": {"label": name}}, []) for name in ("toxic", "rude", "toxic")]
    first, other, again = (Seen(page).page_data()["key"] for page in pages)
    assert first == again != other


def test_without_evidence_the_page_has_no_number_of_wrong_labels(tab: Page, tmp_path: Path) -> None:
    about: dict[str, Any] = {
        "source": "rows.csv", "sha256": "1", "classes": ["0", "1"], "model_name": "m", "rows": 10, "summary": "S.",
        "notes": [], "answer": "class", "columns": {}, "evident": False,
        "pairs": [{"label": "0", "suggested": "1", "rows": 3, "wrong": None}],
    }  # fmt: skip
    rows = [listed(7, "text", "0", "1", "0", "1"), listed(8, "text", "0", "1", kind="check")]
    page = audit_page(Path("a"), about, rows)
    assert "of them wrong" not in page
    (tmp_path / "audit.html").write_text(page, encoding="utf-8")
    tab.messages.clear()
    tab.open(tmp_path / "audit.html", width=1440)
    shown = tab.run("[...document.querySelectorAll('#rows .small')].map(e => e.textContent)")
    assert shown == ["row 7", "row 8 · to check"]
    saved = "new Promise(done => { URL.createObjectURL = (blob) => { blob.text().then(done); return '#'; };"
    table = tab.run(f"{saved} document.getElementById('export').click(); }})")
    assert [row["wrong_probability"] for row in csv.DictReader(io.StringIO(table))] == ["", ""]
    assert tab.messages == []


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("answer", ["tags", "labels"])
def test_a_token_is_marked_in_its_sentence_and_sets_of_labels_fit(
    answer: str, width: int, tab: Page, tmp_path: Path
) -> None:
    # A letter beyond 16 bits is one in Python, and two in a string of JavaScript.
    names, text = ["B-creative-work", "B-person", "O"], "🙂 Empire State Building = ESB . " * 8
    tags = answer == "tags"
    label, other = ("B-person", "B-creative-work") if tags else ("B-person|O", "B-creative-work|O")
    marked = [{"token": k, "word": "Building", "start": 15} if tags else {} for k in (2, 5)]
    rows = [listed(7, text, label, other, label, other, wrong_probability=0.9, **one) for one in marked]
    about: dict[str, Any] = {
        "source": "rows.jsonl", "sha256": str(width), "classes": names, "model_name": "m", "rows": 10, "summary": "S.",
        "notes": [], "answer": answer, "columns": {}, "evident": True, "pairs": [],
    }  # fmt: skip
    path = tmp_path / "audit.html"
    path.write_text(audit_page(Path("a"), about, rows), encoding="utf-8")
    tab.messages.clear()
    tab.open(path, width=width)
    assert tab.messages == []
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run("[...document.querySelectorAll('#rows mark')].map(m => m.textContent)") == ["Building"] * 2 * tags
    assert tab.run(SHOWN) == [text] * 2
    if tags:
        press(tab, "2")
        tab.open(path, width=width)  # the choice of one token of the row stays, and that of the other stays open
        assert tab.run("document.querySelectorAll('#rows > li.done').length") == 1
