"""A tag for each token, from the file to metrics, predictions and the report, by the commands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from runs import make_rows, save_checkpoint, write_config, write_jsonl
from seen import Seen
from tables import cells_of, read_as
from tsqlora.auditing.command import run_audit
from tsqlora.auditing.review import apply_review
from tsqlora.errors import DataError
from tsqlora.rows.labels import encode_labels
from tsqlora.rows.rows import find_columns
from tsqlora.rows.splits import read_data
from tsqlora.rows.tokens import tokenise_words
from tsqlora.rows.write import write_rows

Run = Callable[..., tuple[int, str, str]]
MOODS = dict.fromkeys(["good", "fine", "warm", "glad", "sunny", "kind"], "B-good")
MOODS |= dict.fromkeys(["bad", "poor", "cold", "sad", "rainy", "mean"], "B-bad")


def tagged(n: int, seed: int = 0) -> list[dict[str, Any]]:
    words = [row["text"].split() for row in make_rows(n, seed=seed)]
    return [{"tokens": own, "tags": [MOODS.get(word, "O") for word in own]} for own in words]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    save_checkpoint(folder / "model")
    for name, count in (("train", 60), ("validation", 10), ("test", 20)):
        write_jsonl(folder / "data" / f"{name}.jsonl", tagged(count, seed=count))
    task = {"type": "token-classification"}
    write_config(folder / "c.yaml", folder / "model", folder / "data", task=task, training={"epochs": 6})
    return folder


def test_a_run_trains_measures_predicts_and_reports(place: Path, tsqlora: Run) -> None:
    run, test = place / "run", place / "data" / "test.jsonl"
    assert tsqlora("train", place / "c.yaml", "--set", "data.max_length=8", "--out", run)[0] == 0
    record = json.loads((run / "run.json").read_text())
    assert (record["task"], record["labels"]) == ("token-classification", ["B-bad", "B-good", "O"])
    assert record["quality"]["looks"][0]["head_start"]["replaced"]
    assert record["metrics"]["test"]["span_f1"] > 0.6
    assert any("behind the cut" in note for note in record["notes"])
    assert tsqlora("predict", run, "--data", test, "--out", place / "p.jsonl")[0] == 0
    rows = cells_of(place / "p.jsonl")
    assert all(len(row["prediction"]) == len(row["tokens"]) == len(row["probability"]) for row in rows)
    long = next(row for row in rows if len(row["tokens"]) > 6)
    assert (long["prediction"][6:], set(long["probability"][6:])) == (["O"] * (len(long["tokens"]) - 6), {None})
    assert tsqlora("predict", run, "--data", test, "--out", place / "p.csv")[0] == 0
    cells = next(row for row in cells_of(place / "p.csv") if row["tokens"] == "|".join(long["tokens"]))
    assert cells["prediction"].split("|") == long["prediction"]
    six = [None if p is None else float(f"{p:.6g}") for p in long["probability"]]
    assert [float(p) if p else None for p in cells["probability"].split("|")] == six
    code, out, _ = tsqlora("evaluate", run, "--data", place / "p.jsonl", "--json")
    assert (code, json.loads(out)) == (0, pytest.approx(record["metrics"]["test"]))
    assert tsqlora("report", run)[0] == 0


def test_the_first_piece_of_a_word_has_its_tag_and_words_behind_the_cut_are_counted(place: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    rows = [{"tokens": ["good-day", "the", "stone", "sad"], "tags": ["B", "O", "O", "B"]}]
    data = read_data(
        str(write_jsonl(place / "pieces.jsonl", [*rows, *rows])), None, None,
        **read_as("tags"), validation_fraction=0.5, seed=0,
    )  # fmt: skip
    part, classes, columns = list(data["train"]), data["train"].classes, data["train"].columns
    assert classes is not None
    labels = encode_labels(part, "tags", classes)
    split = tokenise_words(part, columns, tokenizer, max_length=7, labels=labels)
    # [CLS] good - day the stone [SEP]
    assert split[0]["labels"] == [-100, 0, -100, -100, 1, 1, -100]
    assert (split.truncated, split.cut_words) == (1, 1)
    numbered = tokenise_words(part, columns, tokenizer, max_length=20, labels=None)
    assert numbered[0]["labels"][1:5] == [0, -100, -100, 1]


def test_rows_that_are_no_tokens_with_tags_are_named(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    data = tmp_path / "data"
    rows = tagged(30)
    write_jsonl(data / "train.jsonl", [*rows, {"tokens": ["the", "day"], "tags": ["O"]}])
    options = ("train", place / "c.yaml", "--set", f"data.train={data}", "--out", tmp_path / "run")
    code, _, err = tsqlora(*options, "--set", "data.max_bad_rows=0")
    assert (code, "unequal" in err, "31" in err) == (3, True, True)
    wrong: list[dict[str, Any]] = [{"tokens": "the day", "tags": ["O", "O"]}, {"tokens": ["the"], "tags": [0.5]}]
    for bad in wrong:
        write_jsonl(data / "train.jsonl", [*rows, bad])
        code, _, err = tsqlora(*options)
        assert (code, "train.jsonl:31" in err) == (3, True), err
    write_jsonl(data / "train.jsonl", rows)
    write_jsonl(data / "test.jsonl", [{"tokens": ["the"], "tags": ["B-new"]}])
    code, _, err = tsqlora(*options)
    assert (code, "test.jsonl:1" in err, "B-new" in err) == (3, True, True)
    assert not (tmp_path / "run").exists()


def test_columns_of_tokens_and_tags_have_usual_names() -> None:
    common: dict[str, Any] = {"text": None, "text_pair": None, "label": None, "source": "a.jsonl", "tokens": True}
    result = find_columns(["id", "words", "ner_tags"], **common)
    assert (result.text, result.text_pair, result.label) == ("words", None, "ner_tags")
    with pytest.raises(DataError, match=r"data\.text"):
        find_columns(["text", "label"], **common)


def test_an_audit_lists_tokens_and_a_review_changes_their_tags_alone(place: Path, tmp_path: Path) -> None:
    rows = tagged(80, seed=3)
    rows[5]["tokens"].insert(0, "\x00")  # the tokenizer makes no piece of it
    rows[5]["tags"].insert(0, "O")
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, rows)
    task = ["task.type=token-classification"]
    result = run_audit(str(data), model=str(place / "model"), out=tmp_path / "audit", overrides=task)
    table = list(cells_of(result["suspects"]))
    for row in table:
        own, token = rows[int(row["row"])], int(row["token"])
        assert (row["word"], row["label"]) == (own["tokens"][token], own["tags"][token])
        assert row["label"] != "O"
    shown = Seen(Path(result["page"]).read_text(encoding="utf-8")).page_data()["rows"]
    assert all(row["text"][row["start"] :].startswith(row["word"]) for row in shown)
    first = table[0]
    row, token = int(first["row"]), int(first["token"])
    of_row = [one for one in table if one["row"] == first["row"]]
    write_rows(tmp_path / "r.csv", [{**one, "reviewed_label": "O" if one in of_row else ""} for one in table])
    applied = apply_review(tmp_path / "r.csv", tmp_path / "audit")
    corrected = cells_of(applied["corrected"])
    changed = {int(one["token"]) for one in of_row}
    assert corrected[row]["tags"] == ["O" if j in changed else tag for j, tag in enumerate(rows[row]["tags"])]
    assert token in changed
    assert [one for j, one in enumerate(corrected) if j != row] == [one for j, one in enumerate(rows) if j != row]
    assert list(cells_of(applied["trusted"])) == [corrected[row] | {"reviewed_as": "suspect"}]
    assert (applied["reviewed"], applied["changed"], applied["notes"]) == (len(of_row), len(of_row), [])
    partly = next(one for one in table if [other["row"] for other in table].count(one["row"]) > 1)
    write_rows(tmp_path / "r.csv", [{**one, "reviewed_label": "O" if one is partly else ""} for one in table])
    assert "in part" in apply_review(tmp_path / "r.csv", tmp_path / "audit")["notes"][0]
