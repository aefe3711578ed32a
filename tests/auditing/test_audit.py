"""An audit from file to table and page, and back: what was reviewed is corrected, and nothing else."""

import csv
import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from runs import make_rows, save_checkpoint, write_jsonl
from seen import Seen
from tables import cells_of
from tsqlora.auditing import command as pipeline
from tsqlora.auditing.command import LEAST, draw_checks, make_listing, run_audit
from tsqlora.auditing.labels.judge import DOUBT, judge
from tsqlora.auditing.labels.suspects import audit_of
from tsqlora.auditing.review import apply_review
from tsqlora.errors import DataError, SettingsError, TsqLoraError, UnsupportedError
from tsqlora.model.named import read
from tsqlora.rows.write import write_rows
from tsqlora.settings import file, load_config

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> =1+1"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and 60 rows of three classes, one of which looks like a formula."""
    folder = tmp_path_factory.mktemp("audit")
    save_checkpoint(folder / "model")
    rows = [{**row, "label": ("no", "Yes", "=maybe")[j % 3]} for j, row in enumerate(make_rows(60))]
    rows[4]["text"] = HOSTILE
    write_jsonl(folder / "train.jsonl", [{**row, "n": j} for j, row in enumerate(rows)])
    return folder


@pytest.fixture(scope="module")
def audited(place: Path) -> dict[str, Any]:
    return run_audit(str(place / "train.jsonl"), model=str(place / "model"), review=9, out=place / "audit")


def table_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "suspects.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def reviewed_as(folder: Path, changes: dict[int, str], name: str = "reviewed.csv") -> Path:
    """The table with reviewed labels for some rows."""
    rows = [{**row, "reviewed_label": changes.get(int(row["row"]), "")} for row in table_of(folder)]
    write_rows(folder / name, rows)
    return folder / name


def test_every_row_is_audited_and_listed_with_its_text(audited: dict[str, Any], place: Path) -> None:
    rows = table_of(place / "audit")
    source = cells_of(place / "train.jsonl")
    assert audited["rows"] == len(rows) == 60
    assert {int(row["row"]) for row in rows} == set(range(60)), "none is held out for validation"
    for row in rows:
        own = source[int(row["row"])]
        assert row["label"].removeprefix("'") == own["label"] != row["suggested_label"].removeprefix("'")
        assert row["text"].removeprefix("'") == own["text"]
        assert row["reviewed_label"] == ""


def test_without_evidence_an_audit_gives_an_order_and_no_number(audited: dict[str, Any], place: Path) -> None:
    # Labels that have nothing to do with the texts.
    assert not audited["evident"]
    assert [audited[name] for name in ("rate", "low", "high")] == [None] * 3
    assert audited["likely_wrong"] == 0
    assert audited["why_not"] in audited["summary"]
    assert not any(letter.isdigit() for letter in audited["summary"])
    assert {row["wrong_probability"] for row in table_of(place / "audit")} == {""}
    assert {pair["wrong"] for pair in audited["pairs"]} == {None}
    page = Seen((place / "audit" / "audit.html").read_text(encoding="utf-8"))
    assert {row["wrong_probability"] for row in page.page_data()["rows"]} == {None}


def test_with_evidence_the_list_has_the_rows_that_training_leaves_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(4, size=600)
    labels = np.where(rng.random(600) < 0.3, rng.integers(4, size=600), true)
    features = (np.eye(8)[true] + 0.35 * rng.normal(size=(600, 8))).astype(np.float32)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"text {j}", "label": f"c{y}"} for j, y in enumerate(labels)])
    table = read(load_config(None, [], sections={"model": {"path": "."}, "data": {"train": str(data)}}))["train"]
    result, judgement = audit_of(features, labels, classes=[f"c{y}" for y in range(4)]), judge(features, labels, 4)
    every = make_listing(result, replace(table, ids=np.arange(600)), review=0, seed=0)
    listing = [row for row in every if row["kind"] == "suspect"]
    assert LEAST < len(listing) == judgement.left_out.sum()
    assert {row["row"] for row in listing} == set(np.flatnonzero(judgement.left_out).tolist())
    chances = [row["wrong_probability"] for row in listing]
    assert chances == sorted(chances, reverse=True)
    assert chances[-1] > DOUBT
    summary = pipeline._summary(result)
    assert all(f"{value:.1%}" in summary for value in (result.rate, result.low, result.high))
    assert f"{result.likely_wrong:,} rows to look at, about {result.expected_wrong:,.0f} of them wrong" in summary
    assert "100" not in pipeline._summary(replace(result, low=0.0, high=1.0)), "that is no bound"
    assert "0.0% of" not in pipeline._summary(replace(result, rate=0.0004)), "some labels are called wrong"


@pytest.mark.parametrize("evident", [False, True])
def test_all_near_duplicates_with_different_labels_are_in_table_page_and_record(
    evident: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """130 pairs; once they are most of the suspects, and once nothing is evident."""
    rows = [
        {"text": f"{row['text']} number {j}", "label": ("no", "yes")[j % 2]} for j, row in enumerate(make_rows(500))
    ]
    rows += [{"text": rows[j]["text"], "label": ("yes", "no")[j % 2]} for j in range(0, 390, 3)]
    pairs = {(j, 500 + k) for k, j in enumerate(range(0, 390, 3))}
    real = pipeline.audit

    def judged(*args: Any, **options: Any) -> Any:
        # The model of the test sees only some words; these are the pairs that a real one would see.
        result = real(*args, **options)
        return replace(result, evident=evident, rate=0.2, duplicates=tuple(sorted(pairs)))

    monkeypatch.setattr(pipeline, "audit", judged)
    about = run_audit(str(write_jsonl(tmp_path / "rows.jsonl", rows)), model=str(place / "model"), out=tmp_path / "a")
    assert {(a, b) for a, b in about["near_duplicates"]} == pairs
    listed = {int(row["row"]): row for row in table_of(tmp_path / "a")}
    assert {tuple(sorted((row, int(cells["near_row"])))) for row, cells in listed.items() if cells["near_row"]} == pairs
    for row in (one for pair in pairs for one in pair):
        assert (listed[row]["kind"] == "near-duplicate") <= (listed[row]["suggested_label"] != listed[row]["label"])
    page = Seen((tmp_path / "a" / "audit.html").read_text(encoding="utf-8")).page_data()["rows"]
    assert {row["row"] for row in page if row["near"] is not None} == {one for pair in pairs for one in pair}


COLUMNS = [
    ({"Frage": "Wo ist das {j} Haus?", "Klasse": "ort"}, "--set data.text=Frage --set data.label=Klasse"),
    ({"text": "Where is house {j}?", "Klasse": "ort"}, "--set data.text=text --set data.label=Klasse"),
    (
        {"id": "{j}", "text": "Where is house {j}?", "the kind": "ort"},
        "--set data.text=text --set 'data.label=the kind'",
    ),
]


@pytest.mark.parametrize(("row", "command"), COLUMNS)
@pytest.mark.parametrize("door", ["audit", "audit with a model", "train"])
def test_an_unknown_column_of_labels_is_asked_for_with_the_command(
    row: dict[str, str],
    command: str,
    door: str,
    place: Path,
    tmp_path: Path,
    tsqlora: Callable[..., tuple[int, str, str]],
) -> None:
    rows = [{name: value.replace("{j}", str(j)) for name, value in row.items()} for j in range(60)]
    rows = [one | {[*row][-1]: ("ort", "zeit")[j % 2]} for j, one in enumerate(rows)]
    write_rows(tmp_path / "rows.csv", rows)
    words = ["train", "--data", tmp_path / "rows.csv"] if door == "train" else ["audit", tmp_path / "rows.csv"]
    words += [] if door == "audit" else ["--model", place / "model"]
    code, _, err = tsqlora(*words)
    assert (code, command in err, "needs its tokenizer" in err) == (3, True, False)


def test_tokens_and_tags_open_their_door(place: Path, tmp_path: Path) -> None:
    rows = [{"tokens": row["text"].split(), "tags": ["O"] * len(row["text"].split())} for row in make_rows(60)]
    for j, row in enumerate(rows):
        row["tags"][0] = ("B-x", "B-y")[j % 2]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    about = run_audit(str(data), model=str(place / "model"), out=tmp_path / "a")
    assert (about["task"], about["answer"]) == ("token-classification", "tags")


def test_without_a_model_classes_of_text_are_for_the_embedded_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "package_folder", lambda name: tmp_path / name)
    chats = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": chats}] * 5)
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows(9))
    config = load_config(None, [f"data.train={data}"])
    assert config.model.path == str(tmp_path / file.ENCODER / "model")
    with pytest.raises(SettingsError, match=r"model\.path must be set .* causal-lm"):
        load_config(None, [f"data.train={tmp_path / 'chats.jsonl'}"])


def test_two_rows_are_too_few_and_no_validation_rows_are_asked_for(place: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows(2, labels=("no", "yes")))
    with pytest.raises(DataError, match="2 rows are too few for an audit"):
        run_audit(str(data), model=str(place / "model"), out=tmp_path / "a")


def test_checks_are_no_suspects_and_come_evenly_from_the_classes() -> None:
    labels = np.array([0] * 50 + [1] * 30 + [2] * 2)
    chosen = draw_checks(labels, 12, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == 12
    assert np.bincount(labels[chosen]).tolist() == [5, 5, 2]
    assert len(draw_checks(labels, 500, np.random.default_rng(0))) == len(labels)


@pytest.mark.usefixtures("audited")
def test_the_page_escapes_what_strangers_wrote_and_asks_for_nothing(place: Path) -> None:
    page = (place / "audit" / "audit.html").read_text(encoding="utf-8")
    seen = Seen(page)
    assert "<img" not in page
    assert len(seen.texts["script"]) == 2
    policy = next(result["content"] for _, result in seen.tags if result.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert not {"src", "href"} & {name for tag, result in seen.tags if tag not in ("a",) for name in result}
    assert HOSTILE in {row["text"] for row in seen.page_data()["rows"]}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".json", ".parquet"])
def test_a_review_changes_the_reviewed_labels_alone(suffix: str, place: Path, tmp_path: Path) -> None:
    rows = cells_of(place / "train.jsonl")
    data = tmp_path / f"rows{suffix}"
    if suffix == ".json":
        data.write_text(json.dumps(rows))
    else:
        write_rows(data, rows)
    run_audit(str(data), model=str(place / "model"), out=tmp_path / "audit")
    table = reviewed_as(tmp_path / "audit", {3: " yes ", 7: "'=maybe", 8: rows[8]["label"]})
    result = apply_review(table)
    before, after = cells_of(data), cells_of(result["corrected"])
    assert result["reviewed"] == 3
    changed = {3: "Yes", 7: "=maybe"}
    assert after == tuple({**row, "label": changed.get(j, row["label"])} for j, row in enumerate(before))
    assert result["next"].startswith(f"tsqlora train --model M --data {result['corrected']} --set data.text=")
    assert f"--set data.label=label --set data.trusted={result['trusted']}" in result["next"]
    trusted = cells_of(result["trusted"])
    assert [str(row["n"]) for row in trusted] == ["3", "7", "8"]
    assert [row["label"] for row in trusted] == ["Yes", "=maybe", rows[8]["label"]]


@pytest.mark.filterwarnings("ignore:.*UTF-8")
@pytest.mark.parametrize(("column", "delimiter"), [("label: # 1", "\t"), ("2024", ";"), ("@label", ":")])
def test_the_next_command_reads_the_corrected_table_as_the_audit_did(
    column: str, delimiter: str, place: Path, tmp_path: Path
) -> None:
    lines = [(row["text"], row["label"]) for row in cells_of(place / "train.jsonl") if row["label"] != "=maybe"]
    with open(tmp_path / "rows.csv", "w", encoding="cp1250", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("text", column), *((f"{text} źle", y) for text, y in lines)])
    settings = {"data.label": column, "data.delimiter": delimiter, "data.encoding": "cp1250"}
    overrides = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    run_audit(str(tmp_path / "rows.csv"), model=str(place / "model"), out=tmp_path / "a: b", overrides=overrides)
    result = apply_review(reviewed_as(tmp_path / "a: b", {3: "Yes"}))
    words = shlex.split(result["next"])
    data = load_config(None, [value for word, value in pairwise(words) if word == "--set"], sections={
        "model": {"path": str(place / "model")}, "data": {"train": words[words.index("--data") + 1]},
    }).data  # fmt: skip
    assert (data.label, data.delimiter, data.encoding) == (column, delimiter, "cp1250")
    assert data.trusted == result["trusted"]


@pytest.mark.parametrize(
    ("classes", "rewritten"),
    [(("True", "False"), str.upper), (("0", "1"), "{}.0".format), (("-3", "7"), "{}.0".format)],
)
def test_labels_may_be_as_a_spreadsheet_or_pandas_writes_them(
    classes: tuple[str, str], rewritten: Callable[[str], str], place: Path, tmp_path: Path
) -> None:
    rows = [{**row, "label": classes[j % 2]} for j, row in enumerate(make_rows(40))]
    write_rows(tmp_path / "rows.csv", rows)
    run_audit(str(tmp_path / "rows.csv"), model=str(place / "model"), out=tmp_path / "audit")
    reviews = {3: rewritten(classes[0]), 4: rewritten(classes[0])}
    lines = cells_of(reviewed_as(tmp_path / "audit", reviews))
    write_rows(tmp_path / "audit" / "r.csv", [{**line, "label": rewritten(line["label"])} for line in lines])
    result = apply_review(tmp_path / "audit" / "r.csv")
    labels = [row["label"] for row in cells_of(result["corrected"])]
    assert labels == [classes[0] if j == 3 else row["label"] for j, row in enumerate(rows)]
    write_rows(tmp_path / "audit" / "r.csv", [{**line, "label": rewritten(classes[1])} for line in lines])
    with pytest.raises(DataError, match="row 4"):
        apply_review(tmp_path / "audit" / "r.csv")


@pytest.mark.filterwarnings("ignore:.*UTF-8")
@pytest.mark.parametrize("own", [None, "cp1250"])
def test_a_reviewed_table_may_be_in_the_encoding_of_the_audit_or_another(
    own: str | None, place: Path, tmp_path: Path, tsqlora: Callable[..., tuple[int, str, str]]
) -> None:
    rows = [{**row, "label": ("zły", "dobry")[j % 2]} for j, row in enumerate(make_rows(40))]
    write_rows(tmp_path / "rows.csv", rows)
    (tmp_path / "rows.csv").write_bytes((tmp_path / "rows.csv").read_bytes().decode().encode(own or "utf-8"))
    overrides = [] if own is None else [f"data.encoding={own}"]
    folder = tmp_path / "audit"
    run_audit(str(tmp_path / "rows.csv"), model=str(place / "model"), out=folder, overrides=overrides)
    table = reviewed_as(folder, {3: "zły", 4: "zły"})
    assert apply_review(table)["changed"] == 1, "in UTF-8, as the page writes it"
    table.write_bytes(table.read_bytes().decode().encode("cp1250"))
    named = () if own else ("--set", "data.encoding=cp1250")
    code, out, _ = tsqlora("audit", "--apply", table, "--json", *named)
    assert (code, json.loads(out)["changed"]) == (0, 1)


@pytest.mark.usefixtures("audited")
@pytest.mark.parametrize(
    ("changes", "edit", "named"),
    [
        ({3: "perhaps"}, {}, ("row 3", "perhaps")),
        ({}, {}, ("reviewed_label",)),
        ({3: "no"}, {"row": "3000"}, ("3000",)),
        ({3: "no"}, {"row": "first"}, ("first",)),
        ({3: "no"}, {"label": "other"}, ("row 3", "other")),
    ],
)
def test_a_table_that_does_not_fit_is_refused_by_row_and_value(
    changes: dict[int, str], edit: dict[str, str], named: tuple[str, ...], place: Path, tmp_path: Path
) -> None:
    rows = [{**row, "reviewed_label": changes.get(int(row["row"]), "")} for row in table_of(place / "audit")]
    write_rows(tmp_path / "reviewed.csv", [row | edit if row["reviewed_label"] else row for row in rows])
    files = sorted((place / "audit").iterdir())
    with pytest.raises(DataError) as error:
        apply_review(tmp_path / "reviewed.csv", place / "audit")
    assert all(name in str(error.value) for name in named)
    assert sorted((place / "audit").iterdir()) == files, "a refused command leaves nothing behind"


def test_a_source_that_changed_since_is_refused(place: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows(30, labels=("no", "yes")))
    run_audit(str(data), model=str(place / "model"), out=tmp_path / "audit")
    table = reviewed_as(tmp_path / "audit", {1: "no"})
    data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match="changed"):
        apply_review(table)


def parts_of(form: str, rows: list[dict[str, Any]], folder: Path) -> str:
    """Write rows in two parts, or as a saved set, over what was there; the name of all."""
    folder.mkdir(exist_ok=True)
    if form == "saved splits":
        shutil.rmtree(folder)
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(folder)
        return str(folder)
    if form == "shards":
        write_jsonl(folder / "train-00000-of-00002.jsonl", rows[:10])
        write_jsonl(folder / "train-00001-of-00002.jsonl", rows[10:])
        return str(folder)
    if form == "saved":
        shutil.rmtree(folder)
        datasets.Dataset.from_list(rows).save_to_disk(folder)
        return str(folder)
    write_jsonl(folder / "a.jsonl", rows[:10])
    write_jsonl(folder / "b.jsonl", rows[10:])
    return f"{folder}/*.jsonl"


@pytest.mark.parametrize("form", ["pattern", "shards", "saved", "saved splits"])
def test_parts_that_changed_since_are_refused(form: str, place: Path, tmp_path: Path) -> None:
    rows = make_rows(30, labels=("no", "yes"))
    source = parts_of(form, rows, tmp_path / "rows")
    run_audit(source, model=str(place / "model"), out=tmp_path / "audit")
    table = reviewed_as(tmp_path / "audit", {5: "no", 6: "no"})
    corrected = apply_review(table)["corrected"]
    labels = {5: "no", 6: "no"}
    assert cells_of(corrected) == tuple({**row, "label": labels.get(j, row["label"])} for j, row in enumerate(rows))
    parts_of(form, rows[2:], tmp_path / "rows")
    with pytest.raises(DataError, match="changed"):
        apply_review(table)


def test_a_pattern_means_the_same_files_from_another_directory(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home [1]"
    parts_of("pattern", make_rows(30, labels=("no", "yes")), home)
    monkeypatch.chdir(home)
    run_audit("*.jsonl", model=str(place / "model"), out=tmp_path / "audit")
    monkeypatch.chdir(tmp_path)
    assert apply_review(reviewed_as(tmp_path / "audit", {5: "no"}))["reviewed"] == 1
    shutil.copy(reviewed_as(tmp_path / "audit", {5: "no"}), home / "reviewed.csv")
    shutil.copy(tmp_path / "audit" / "audit.json", home)
    (home / "b.jsonl").rename(home / "corrected.jsonl")
    with pytest.raises(SettingsError, match="would replace"):
        apply_review(home / "reviewed.csv")


def test_without_its_audit_a_table_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "reviewed.csv").write_text("row,label,reviewed_label\n1,no,yes\n")
    with pytest.raises(DataError, match=r"audit\.json"):
        apply_review(tmp_path / "reviewed.csv")


@pytest.mark.usefixtures("audited")
def test_what_cannot_be_audited_is_refused_before_anything_is_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, model = str(place / "train.jsonl"), str(place / "model")
    monkeypatch.setattr(file, "ENCODER", "no_such_package")
    refused: list[tuple[type[TsqLoraError], str, Callable[[], Any]]] = [
        (SettingsError, "--model", lambda: run_audit(data)),
        (SettingsError, "--out", lambda: run_audit(data, model=model, out=place / "audit")),
        (UnsupportedError, "regression", lambda: run_audit(data, model=model, overrides=["task.type=regression"])),
        (DataError, "none.csv", lambda: run_audit("none.csv", model=model)),
    ]
    for kind, named, call in refused:
        with pytest.raises(kind, match=named):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_before_the_pass(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("audited")

    monkeypatch.setattr(pipeline, "audited", never)
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="--out"):
        run_audit(str(place / "train.jsonl"), model=str(place / "model"), out=tmp_path / "file" / "audit")


def test_apply_and_an_audit_are_two_commands(tmp_path: Path, tsqlora: Callable[..., tuple[int, str, str]]) -> None:
    assert tsqlora("audit")[0] == tsqlora("audit", "a.csv", "--apply", "b.csv")[0] == 2
    assert tsqlora("audit", "--apply", tmp_path / "none.csv")[0] == 3
    assert tsqlora("audit", "--apply", tmp_path / "none.csv", "--set", "data.label=y")[0] == 2
