"""Files become splits: classes come from training rows, a share is held out, incomplete rows are left out."""

import time
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runs import make_rows, write_jsonl
from tables import read_as
from tsqlora.errors import DataError
from tsqlora.rows.labels import LabelMap, encode_labels
from tsqlora.rows.splits import held_out, held_out_rows, read_data, unmeasured
from tsqlora.rows.table import Table, samples_of

GROUPS = st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=2, max_size=60).map(
    lambda groups: np.unique(groups, return_inverse=True)[1]
)
FRACTIONS = st.floats(0.01, 0.99)
SEEDS = st.integers(0, 2**32)


def read(train: Path, *, answer: str = "class", **options: Any) -> dict[str, Table]:
    defaults: dict[str, Any] = {"validation": None, "test": None, "validation_fraction": 0.25, "seed": 0}
    return read_data(str(train), **(read_as(answer) | defaults | options))


def error(train: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(train, **options)
    return str(caught.value)


@pytest.mark.parametrize("line", ["{}", '{"": "a"}', '{" ": 1}'])
def test_rows_without_columns_are_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f"{line}\n" * 9)
    assert "no columns" in error(path)


# The share held out


@given(GROUPS, FRACTIONS, SEEDS)
def test_a_share_is_held_out_and_one_row_stays(groups: np.ndarray, fraction: float, seed: int) -> None:
    alike = np.zeros_like(groups)
    out = held_out(alike, fraction=fraction, seed=seed, source="")
    assert out.sum() == min(max(1, round(fraction * len(groups))), len(groups) - 1)


@given(GROUPS, FRACTIONS, SEEDS)
def test_classes_keep_their_shares_and_stay_in_training(groups: np.ndarray, fraction: float, seed: int) -> None:
    counts = Counter(groups.tolist())
    if max(counts.values()) == 1:
        return
    out = held_out(groups, fraction=fraction, seed=seed, source="")
    assert set(groups[~out].tolist()) == set(counts)
    taken = Counter(groups[out].tolist())
    assert taken
    if all(count * (1 - fraction) >= 2 for count in counts.values()):
        assert all(abs(taken[group] - count * fraction) < 1 for group, count in counts.items())


def test_a_share_of_many_classes_is_held_out_in_no_time() -> None:
    groups = np.arange(60_000) // 3
    start = time.process_time()
    assert held_out(groups, fraction=0.1, seed=0, source="").sum() == 6_000
    assert time.process_time() - start < 5


def test_a_column_with_nearly_a_value_a_row_holds_no_classes(tmp_path: Path) -> None:
    rows = [{"text": f"row {j}", "label": j % 30} for j in range(50)]
    message = error(write_jsonl(tmp_path / "train.jsonl", rows))
    assert (
        "column 'label' has 30 different values in 50 rows, so it holds no classes (numbers: set task.type" in message
    )
    assert "there is no other column" in message


def test_the_largest_remainder_gets_the_rest() -> None:
    groups = np.array([0] * 7 + [1] * 3)
    assert Counter(groups[held_out(groups, fraction=0.3, seed=0, source="")].tolist()) == {0: 2, 1: 1}


@pytest.mark.parametrize("groups", [[0], [0, 1, 2]])
def test_rows_that_cannot_be_split_are_refused(groups: list[int]) -> None:
    with pytest.raises(DataError, match=r"train.csv .* data.validation"):
        held_out(np.array(groups), fraction=0.5, seed=0, source="train.csv")


# Splits of files


def test_without_validation_a_share_of_the_training_rows_is_taken_class_by_class(tmp_path: Path) -> None:
    splits = read(write_jsonl(tmp_path / "train.jsonl", make_rows(40)))
    train, validation = (list(splits[name]) for name in ("train", "validation"))
    assert (len(train), len(validation), held_out_rows(splits)) == (30, 10, 10)
    assert sum(row.cells["label"] for row in validation) == 5
    assert sorted(row.number for row in [*train, *validation]) == list(range(1, 41))


def test_the_seed_decides_the_validation_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", make_rows(40))
    numbers = [read(path, seed=seed)["validation"].ids.tolist() for seed in (0, 0, 1)]
    assert numbers[0] == numbers[1] != numbers[2]


def test_a_named_validation_file_leaves_the_training_rows_whole(tmp_path: Path) -> None:
    train, other = (write_jsonl(tmp_path / f"{n}.jsonl", make_rows(n)) for n in (40, 6))
    splits = read(train, validation=str(other), test=str(other))
    assert {name: len(table) for name, table in splits.items()} == {"train": 40, "validation": 6, "test": 6}
    assert held_out_rows(splits) == 0
    assert splits["train"].classes == LabelMap((0, 1))


def test_spellings_of_a_class_are_one_class_with_a_note_that_counts_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    spelled = {"pos": ("pos ", "Pos", "ＰＯＳ"), "café": ("cafe\u0301", " CAFÉ"), "7": (" 7",)}
    labels = rng.choice([*spelled], 400, p=[0.8, 0.15, 0.05]).tolist()
    changed = rng.random(400) < 0.1
    written = [str(rng.choice(spelled[y])) if other else y for y, other in zip(labels, changed, strict=True)]
    rows = [{"text": f"row {j}", "label": label} for j, label in enumerate(written)]
    with pytest.warns(UserWarning, match="other spellings") as warned:
        splits = read(write_jsonl(tmp_path / "train.jsonl", rows))
    classes = splits["train"].classes or pytest.fail("no classes")
    assert classes.names == ("7", "café", "pos")
    assert sum(classes.spellings.values()) == changed.sum()
    (note,) = [str(one.message) for one in warned]
    assert note in splits["train"].notes
    count = sum(label in spelled["pos"] for label in written)
    assert f"as 'pos' in {count} rows" in note
    for table in splits.values():
        ids = encode_labels(table, "label", classes)
        assert [classes.names[id] for id in ids] == [labels[j] for j in table.ids]


def test_spellings_of_numbers_in_a_csv_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"row {j},{('1', '0', ' 1', '1.0')[j % 4]}\n" for j in range(40)))
    with pytest.warns(UserWarning, match="' 1'"):
        assert read(path)["train"].classes == LabelMap((0, 1))


def test_classes_that_a_data_set_names_stay_apart(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["us", "US"])})
    rows = {"text": ["a", "b"] * 10, "label": [0, 1] * 10}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.warns(UserWarning, match="'US', 'us'; use one spelling"):
        splits = read(tmp_path / "train.parquet")
    assert splits["train"].classes == LabelMap(("US", "us"))


@pytest.mark.parametrize(
    "labels", [("0.5", "1", "2.25"), ("0,5", "1,0", "2,25"), (*(f"{j}.5" for j in range(12)), "v2")]
)
def test_classes_that_look_like_measures_are_warned_of(labels: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("\n".join(["text;score", *(f"good;{v}" for v in labels * 5)]))
    with pytest.warns(UserWarning, match="regression"):
        read(tmp_path / "train.csv")
    (tmp_path / "many.csv").write_text("\n".join(["text;score", *(f"good;{j},5" for j in range(50))]))
    assert "numbers: set task.type to regression" in error(tmp_path / "many.csv")


@pytest.mark.parametrize("missing", ["N/A", "NA", "n/a", "null", "None", "nan"])
def test_a_class_that_looks_like_a_missing_label_is_warned_of(missing: str, tmp_path: Path) -> None:
    labels = ("good", "bad", "good", missing)
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *(f"so,{v}" for v in labels * 5)]))
    with pytest.warns(UserWarning, match=f"label '{missing}' of 5 rows .* missing") as warned:
        read(tmp_path / "train.csv")
    assert len(warned) == 1


@pytest.mark.parametrize(("sign", "name"), [(", ", "commas"), (";", "semicolons")])
def test_classes_that_are_joined_are_warned_of(sign: str, name: str, tmp_path: Path) -> None:
    sets = [sign.join(one) for k in (1, 2) for one in combinations(("joy", "fear", "love", "grief"), k)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *(f'so,"{one}"' for one in sets * 5)]))
    with pytest.warns(UserWarning, match=f"the 10 classes in column 'label' are 4 names joined by {name}"):
        read(tmp_path / "train.csv")


def test_decimal_commas_are_measurements_alone(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("\n".join(["text;label", *(f"so;{j % 60 // 10},{j % 10}" for j in range(240))]))
    with pytest.warns(UserWarning, match="numbers with decimals") as warned:
        read(tmp_path / "train.csv")
    assert not any("joined" in str(one.message) for one in warned)


def test_without_a_column_that_may_be_a_label_the_cure_is_another_task(tmp_path: Path) -> None:
    rows = [{"text": f"text {j}", "meta": {"source": "web"}} for j in range(20)]
    with pytest.raises(DataError, match=r"no label column; set task.type to causal-lm"):
        read(write_jsonl(tmp_path / "train.jsonl", rows))


def test_a_class_without_validation_rows_is_named(tmp_path: Path) -> None:
    labels = ["good", "bad"] * 10 + ["rare"] * 2
    rows = [{"text": f"text {j}", "label": label} for j, label in enumerate(labels)]

    def note(path: Path, **options: Any) -> str | None:
        splits = read(path, **options)
        for name, table in splits.items():
            labels = encode_labels(table, "label", splits["train"].classes or pytest.fail("no classes"))
            samples = samples_of([{"labels": number} for number in labels], (), 0, table.ids)
            splits[name] = replace(table, samples=samples)
        return unmeasured(splits)

    path, two = write_jsonl(tmp_path / "train.jsonl", rows), write_jsonl(tmp_path / "two.jsonl", rows[:20])
    assert "'rare' (2 rows)" in (note(path, validation_fraction=0.1) or "")
    assert note(two) is None
    assert note(path, validation=str(two)) is None


@pytest.mark.parametrize("label", [-1, "-1", None, " "])
def test_an_unlabelled_test_split_that_no_setting_names_is_left_out(label: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", make_rows(12))
    test = write_jsonl(tmp_path / "test.jsonl", [{"text": "good", "label": label}] * 3)
    with pytest.warns(UserWarning, match=r"test\.jsonl .*'label'.* left out"):
        assert set(read(tmp_path)) == {"train", "validation"}
    if label in (-1, "-1"):
        assert "test" in read(tmp_path, test=str(test))  # prepare refuses these labels
    else:
        assert "test.jsonl: 3 of 3 rows" in error(tmp_path, test=str(test))
    write_jsonl(tmp_path / "test.jsonl", [{"text": "good", "label": -1}, {"text": "good", "label": 1}])
    assert "test" in read(tmp_path)


GOOD = make_rows(20)
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
TALKS = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}


@pytest.mark.parametrize(
    ("rows", "answer", "message"),
    [
        ([{"text": "good", "mood": 1}] * 3, "class", "--set data.text=text --set data.label=mood"),
        ([{"text": "good", "label": "a"}] * 5, "class", "train.jsonl, column 'label': 'a' is the only class"),
        ([PAIR] * 3, "class", "set task.type to preference"),
        ([{"messages": []}] * 3, "class", "set task.type to causal-lm"),
        ([{"prompt": "a", "completion": "b"}] * 3, "number", "set task.type to causal-lm"),
        ([PAIR] * 3, "text", "set task.type to preference"),
        ([*make_rows(10), {"text": "good", "label": "warm"}], "class", "train.jsonl:11: the label 'warm'"),
        ([*make_rows(10), {"text": "good", "label": "warm"}], "number", "train.jsonl:11: label 'warm'"),
    ],
)
def test_a_bad_row_is_named_before_anything_is_split(rows: Any, answer: str, message: str, tmp_path: Path) -> None:
    assert message in error(write_jsonl(tmp_path / "train.jsonl", rows), answer=answer)


# Incomplete rows


@pytest.mark.parametrize(
    ("answer", "good", "bad", "reason"),
    [
        ("class", GOOD, {"text": " ", "label": 1}, "no text in column 'text'"),
        ("class", GOOD, {"text": "good"}, "no label in column 'label'"),
        ("number", [{**row, "label": 0.5} for row in GOOD], {"text": "a", "label": float("nan")}, "no label in"),
        (
            "class",
            [{**row, "text_pair": "a"} for row in GOOD],
            {"text": "a", "label": 1},
            "no text in column 'text_pair'",
        ),
        ("text", [{"prompt": "a", "completion": "b"}] * 20, {"prompt": "a", "completion": ""}, "no target in column"),
        ("text", [{"text": "a"}] * 20, {"text": ""}, "no text in column 'text'"),
        ("text", [{"messages": CHAT}] * 20, {"messages": []}, "no messages in column 'messages'"),
        ("text", [{"messages": CHAT}] * 20, {"messages": CHAT[:1]}, "no assistant's turn"),
        ("text", [{"messages": CHAT}] * 20, {"messages": [CHAT[0], {**CHAT[1], "content": ""}]}, "a message without"),
        ("pair", [PAIR] * 20, {**PAIR, "rejected": ""}, "no answer in column 'rejected'"),
        ("pair", [TALKS] * 20, {**TALKS, "rejected": [CHAT[1] | {"content": ""}]}, "text in column 'rejected'"),
        ("pair", [TALKS] * 20, {**TALKS, "chosen": [CHAT[1] | {"content": ""}]}, "text in column 'chosen'"),
    ],
)
def test_incomplete_rows_are_left_out_up_to_a_share(
    answer: str, good: Any, bad: Any, reason: str, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [*good[:5], bad, *good[5:]])
    with pytest.raises(DataError, match=r"train\.jsonl: 1 of 21 .*data\.max_bad_rows \(0\.04\) .*line 6") as caught:
        read(path, answer=answer, max_bad_rows=0.04)
    assert reason in str(caught.value)
    with pytest.warns(UserWarning, match=r"train\.jsonl: 1 of 21 .*line 6") as warned:
        splits = read(path, answer=answer, max_bad_rows=0.05)
    assert splits["train"].notes == (str(warned[0].message),)
    ids = np.concatenate([table.ids for table in splits.values()])
    assert sorted(ids.tolist()) == [j for j in range(21) if j != 5]
    assert [row.number - 1 for row in splits["train"]] == splits["train"].ids.tolist()


def test_turns_behind_the_last_answer_are_said(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"messages": CHAT}] * 8 + [{"messages": [*CHAT, CHAT[0]]}] * 2)
    with pytest.warns(UserWarning, match=r"2 of 10 chats end with turns that have no answer") as warned:
        splits = read(path, answer="text")
    assert splits["train"].notes == (str(warned[0].message),)


def test_the_share_counts_by_file_and_one_message_lists_every_kind(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", GOOD)
    other = write_jsonl(tmp_path / "other.jsonl", [{"label": 0}, *GOOD, *[{"text": "good"}] * 7])
    with pytest.raises(DataError, match=r"other\.jsonl: 8 of 28 .* 1 with no text .*\(line 1\), 7 with no label") as e:
        read(train, max_bad_rows=0.2, validation=str(other))
    assert "(lines 22, 23, 24, 25, 26, …)" in str(e.value)


@pytest.mark.parametrize("split", ["validation", "test", "trusted"])
@pytest.mark.parametrize(("missing", "other"), [("text", "sentence"), ("label", "class")])
def test_a_file_without_a_column_of_the_training_rows_is_named(
    split: str, missing: str, other: str, tmp_path: Path
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", GOOD)
    rows = [{other if name == missing else name: value for name, value in row.items()} for row in GOOD]
    path = write_jsonl(tmp_path / "other.jsonl", rows)
    message = error(train, **{split: str(path)})
    assert f"other.jsonl has no column '{missing}'" in message
    assert f"'{other}'" in message
    assert "max_bad_rows" not in message


def test_more_rows_than_a_chunk_count_together(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"label": 1}, *make_rows(2500), {"label": 1}])
    with pytest.warns(UserWarning, match=r"2 of 2,502 rows .*lines 1, 2502"):
        splits = read(path, max_bad_rows=0.05)
    assert sum(map(len, splits.values())) == 2500
    assert splits["train"].ids.min() >= 1


def test_tags_that_are_numbers_without_names_are_warned_of(tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b"], "tags": [0, j % 2]} for j in range(8)]
    write_jsonl(tmp_path / "t.jsonl", rows)
    with pytest.warns(UserWarning, match="'tags'.*span_f1"):
        read(tmp_path / "t.jsonl", answer="tags")


@pytest.mark.parametrize("others", [(0, 1), (0, 1, 2)])
def test_a_class_that_may_stand_for_no_label_is_warned_of(others: tuple[int, ...], tmp_path: Path) -> None:
    rows = [{"text": f"text {j}", "label": label} for j, label in enumerate((-1, *others) * 4)]
    write_jsonl(tmp_path / "t.jsonl", rows)
    with pytest.warns(UserWarning, match="label -1"):
        read(tmp_path / "t.jsonl")
    write_jsonl(tmp_path / "two.jsonl", [{**row, "label": (-1, 1)[j % 2]} for j, row in enumerate(rows)])
    read(tmp_path / "two.jsonl")


# Names of class numbers


def test_class_numbers_are_named_in_every_split_and_stay_numbers_as_targets(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": ["a", "b"] * 4, "label": [0, 1] * 4}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    other = write_jsonl(tmp_path / "v.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": "no"}])
    result = read(tmp_path / "train.parquet", validation=str(other))
    assert result["train"].classes == LabelMap(("no", "yes"))
    assert [row.cells["label"] for row in result["validation"]] == ["yes", "no"]
    numbered = read(tmp_path / "train.parquet", numbers=True)
    assert numbered["train"].classes == LabelMap((0, 1))
    targets = read(tmp_path / "train.parquet", answer="number")
    assert {row.cells["label"] for row in targets["train"]} == {0, 1}
