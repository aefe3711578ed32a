"""Splits become samples, read in chunks: the slow twin tokenises all rows of a split at once."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from byte_tokenizers import CHATML, byte_tokenizer
from runs import Row, make_rows, save_checkpoint, write_jsonl
from tables import cells_of, read_as, task_for
from tsqlora.auditing.draw.subset import equals
from tsqlora.errors import DataError, SettingsError
from tsqlora.rows import table as table_module
from tsqlora.rows.labels import encode_labels, encode_targets
from tsqlora.rows.splits import prepare as prepare_tables
from tsqlora.rows.splits import read_data, resolve_max_length, without_measured
from tsqlora.rows.table import Samples, Table, data_hash, notes_of
from tsqlora.rows.tokens import tokenise, tokenise_generation
from tsqlora.rows.write import write_rows
from tsqlora.tasks import Task, get_task


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(save_checkpoint(tmp_path_factory.mktemp("model")))


def read(train: Path, *, answer: str = "class", **options: Any) -> dict[str, Table]:
    defaults: dict[str, Any] = {"validation": None, "test": None, "validation_fraction": 0.25, "seed": 0}
    return read_data(str(train), **(read_as(answer) | defaults | options))


def prepare(tables: dict[str, Table], tokenizer: Any, *, max_length: int, task: Task | None = None) -> dict[str, Table]:
    task = task or task_for("class" if tables["train"].format is None else "text")
    return prepare_tables(tables, tokenizer, max_length=max_length, encode=task.reading.encode)


def at_once(table: Table, tokenizer: PreTrainedTokenizerBase) -> Samples:
    rows, column = list(table), table.columns.label
    if table.format is not None:
        return tokenise_generation(rows, table.format, tokenizer, max_length=8, seq2seq=False)
    assert column is not None
    labels = encode_targets(rows, column) if table.classes is None else encode_labels(rows, column, table.classes)
    return tokenise(rows, table.columns, tokenizer, max_length=8, labels=labels)


def assert_same(tables: dict[str, Table], prepared: dict[str, Table], tokenizer: PreTrainedTokenizerBase) -> None:
    for name, table in prepared.items():
        split, slow = table.samples, at_once(tables[name], tokenizer)
        assert list(split) == list(slow)
        assert [type(row["labels"]) for row in split] == [type(row["labels"]) for row in slow]
        assert (split.hashes, split.truncated, split.left_out) == (slow.hashes, slow.truncated, slow.left_out)
        assert split.ids.tolist() == slow.ids.tolist() == table.ids.tolist()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("labels", [(0, 1), ("no", "yes")])
@pytest.mark.parametrize("size", [1, 7, 1024])
def test_chunks_give_the_samples_of_all_rows_at_once(
    size: int,
    labels: tuple[Any, Any],
    suffix: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(table_module, "CHUNK", size)
    write_rows(tmp_path / f"train{suffix}", make_rows(30, labels=labels))
    splits = read(tmp_path / f"train{suffix}")
    assert_same(splits, prepare(splits, tokenizer, max_length=8), tokenizer)


@pytest.mark.parametrize("size", [2, 1024])
def test_numbers_and_texts_come_in_chunks_too(
    size: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "CHUNK", size)
    rows = [{**row, "label": j / 7} for j, row in enumerate(make_rows(30))]
    splits = read(write_jsonl(tmp_path / "train.jsonl", rows), answer="number")
    assert_same(splits, prepare(splits, tokenizer, max_length=8), tokenizer)
    texts = [{"prompt": "abcd"[: j % 4 + 1], "completion": "d" * j} for j in range(1, 12)]
    splits, writes = read(write_jsonl(tmp_path / "train.jsonl", texts), answer="text"), byte_tokenizer()
    assert_same(splits, prepared := prepare(splits, writes, max_length=8), writes)
    assert 0 < len(prepared["train"]) < len(splits["train"])


def test_an_id_is_the_rows_place_in_the_file_whatever_its_line(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "train.csv"
    write_rows(path, [{**row, "text": f"{row['text']}\n{row['text']}"} for row in make_rows(30)])
    prepared, file = prepare(read(path), tokenizer, max_length=8), cells_of(path)
    for table in prepared.values():
        for place, sample in zip(table.ids, table.samples, strict=True):
            assert sample["input_ids"] == tokenizer(file[place]["text"], truncation=True, max_length=8)["input_ids"]
    assert sorted(id for table in prepared.values() for id in table.ids) == list(range(30))


def test_each_row_of_texts_is_rendered_and_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML, eos="<|im_end|>")
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * j}] for j in range(1, 21)]
    path = write_jsonl(tmp_path / "train.jsonl", [{"messages": chat} for chat in chats])
    rendered = list[Any]()
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda turns, **o: rendered.append(o) or render(turns, **o))
    prepare(read(path, answer="text"), tokenizer, max_length=200)
    assert len(rendered) == 2 * len(chats)  # the answer, and the prompt before it


def test_the_limit_that_no_target_fits_into_is_named(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b" * 20} for _ in range(4)]
    splits = read(write_jsonl(tmp_path / "train.jsonl", rows), answer="text")
    with pytest.raises(DataError, match=r"data\.max_length to 21"):
        prepare(splits, byte_tokenizer(opens=False, closes=True), max_length=8, task=get_task("seq2seq"))


def test_rows_of_other_splits_that_training_has_are_noted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train = [{"text": f"good {j}", "label": j % 2} for j in range(8)]
    other, test = ([{"text": f"good {j}", "label": 0} for j in rows] for rows in ((8, 9), (1, 9, 3)))
    a, b, c = (write_jsonl(tmp_path / f"{n}.jsonl", rows) for n, rows in (("a", train), ("b", other), ("c", test)))
    (note,) = notes_of(prepare(read(a, validation=str(b), test=str(c)), tokenizer, max_length=8))
    assert note.startswith("2 of 3 test rows are training rows")


def test_a_class_that_training_lacks_is_an_error_of_the_other_split(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", make_rows(10, labels=("a", "b")))
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "good", "label": "c"}])
    with pytest.raises(DataError, match=r"other\.jsonl:1: label 'c'"):
        prepare(read(train, validation=str(other)), tokenizer, max_length=8)


def test_the_hash_names_every_row_of_every_split(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def hash_of(rows: list[dict[str, Any]], **options: Any) -> str:
        splits = read(write_jsonl(tmp_path / "train.jsonl", rows), **options)
        return data_hash(prepare(splits, tokenizer, max_length=8))

    rows = make_rows(20)
    changed = [*rows[:-1], {**rows[-1], "label": 0}]
    hashes = [hash_of(rows), hash_of(changed), hash_of(rows[::-1]), hash_of(rows, seed=1)]
    assert len(set(hashes)) == 4
    assert hash_of(rows) == hashes[0] == "5ab1afd09cd4b778"  # of version 0.1, with which a run is resumed


def peak_of(rows: int, tokenizer: PreTrainedTokenizerBase, folder: Path) -> int:
    train = write_jsonl(folder / "train.jsonl", make_rows(rows))
    tracemalloc.start()
    prepared = prepare(read(train), tokenizer, max_length=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(prepared["train"]) == rows * 3 // 4
    return peak


def test_more_rows_take_no_more_memory_than_a_few_numbers_each(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    few, many = (peak_of(rows, tokenizer, tmp_path) for rows in (2000, 8000))
    # A row read whole, and its three lists of tokens, are more than 1,500.
    assert (many - few) / 6000 < 300


@pytest.mark.parametrize(
    ("setting", "tokenizer_limit", "positions", "length"),
    [(None, 128, 512, 128), (None, 10**30, 512, 512), (None, 128, None, 128), (64, 128, 512, 64), (400, 128, 512, 400)],
)
def test_the_length_is_the_setting_else_the_least_limit(
    setting: int | None, tokenizer_limit: int, positions: int | None, length: int
) -> None:
    assert resolve_max_length(setting, tokenizer_limit=tokenizer_limit, positions=positions) == length


def test_a_length_that_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"data\.max_length 600 is above the model's 512 positions; lower it"):
        resolve_max_length(600, tokenizer_limit=512, positions=512)
    with pytest.raises(SettingsError, match=r"set data\.max_length"):
        resolve_max_length(None, tokenizer_limit=10**30, positions=None)


# Trusted rows: validation and test rows are never among them


def prepared(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, answer: Any = "class", **files: Sequence[Row]
) -> dict[str, Table]:
    """Rows by split name; a quarter of the training rows is held out if there are no validation rows."""
    paths = {name: str(write_jsonl(folder / f"{name}.jsonl", rows)) for name, rows in files.items()}
    splits = without_measured(read(Path(paths.pop("train")), answer=answer, **paths))
    return prepare(splits, tokenizer, max_length=60, task=task_for(answer))


def labelled(texts: Sequence[str], label: int | None = None) -> list[Row]:
    return [{"text": text, "label": j % 2 if label is None else label} for j, text in enumerate(texts)]


def marked(data: dict[str, Table]) -> list[int]:
    """The training rows that are trusted rows, too."""
    same = equals(data["train"].samples, data["trusted"].samples)
    return [] if same is None else np.flatnonzero(same).tolist()


POOL = labelled([f"good {'the ' * j}" for j in range(1, 9)])


def test_trusted_rows_are_a_split_of_their_own_and_part_of_the_datas_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    pool, trusted, test = make_rows(20), make_rows(6, seed=1), make_rows(4, seed=2)
    data = prepared(tmp_path, tokenizer, train=pool, trusted=trusted, test=test)
    assert list(data) == ["train", "trusted", "validation", "test"]
    assert [row.cells for row in data["trusted"]] == list(trusted)
    assert data["trusted"].samples.labels.tolist() == [row["label"] for row in trusted]
    assert (marked(data), notes_of(data)) == ([], [])
    some = [{}, {"trusted": trusted}, {"trusted": trusted[:-1]}, {"trusted": trusted[::-1]}, {"validation": trusted}]
    assert len({data_hash(prepared(tmp_path, tokenizer, train=pool, **files)) for files in some}) == len(some)


@pytest.mark.parametrize(
    ("train", "trusted", "message"),
    [
        (make_rows(10, labels=("a", "b")), {"text": "fine", "label": "c"}, r"trusted\.jsonl:2: label 'c' is not among"),
        (
            make_rows(10, labels=("a", "b")),
            {"text": "fine", "label": ""},
            r"trusted\.jsonl: 1 of 2 .*data\.max_bad_rows \(0\) .*no label in column 'label'",
        ),
    ],
)
def test_a_trusted_row_that_training_could_not_have_is_named(
    train: Any, trusted: Row, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, tokenizer, train=train, trusted=[{"text": "kind", "label": "a"}, trusted])


def chat(*turns: str) -> Row:
    """Turns by turns from the user and the assistant; the system's begin with s."""
    names = {"u": "user", "a": "assistant", "s": "system"}
    return {"messages": [{"role": names[turn[0]], "content": turn} for turn in turns]}


FORMATS: dict[str, Any] = {
    "prompt": [{"prompt": p, "completion": c} for p, c in (("ab", "c"), ("ab", "d"), ("cd", "c"))],
    "document": [{"document": p, "summary": c} for p, c in (("ab", "c"), ("ab", "d"), ("cd", "c"))],
    "alpaca": [{"instruction": "a", "input": p, "output": c} for p, c in (("b", "c"), ("b", "d"), ("", "c"))],
    "chat": [chat("s", "u1", "a1", "u2", "a2"), chat("s", "u1", "a1", "u2", "a3", "u4"), chat("s", "u1", "a2")],
    "text": [{"text": "ab"}, {"text": "ab"}, {"text": "abc"}],
}
"""Of each format a row, one with its input, one with another."""
WARM = labelled(["kind", "kind day", "warm", "warm day"], label=1)
TREES = [{"tokens": [word, "tree"], "tags": ["B-PER", "O"]} for word in ("good", "the", "kind")]
DAYS = [{"text": "good", "text_pair": second, "label": j % 2} for j, second in enumerate(("day", "tree", "a"))]
ABS = [{"prompt": "ab", "completion": answer} for answer in "cde"]


@pytest.mark.filterwarnings("ignore:.*chats end with turns that have no answer")
@pytest.mark.parametrize(
    ("answer", "files", "ids", "same"),
    [
        # A trusted row that is measured on leaves, whatever its label.
        (
            "class",
            {"train": POOL, "trusted": WARM, "validation": labelled(["kind"]), "test": labelled(["warm day", "a"])},
            [1, 2],
            [],
        ),
        # A training row with a trusted row's input is marked, whatever its label.
        (
            "class",
            {
                "train": POOL,
                "trusted": [*({**POOL[j], "label": 1 - POOL[j]["label"]} for j in (1, 6)), *labelled(["kind"])],
                "validation": labelled(["a"]),
            },
            [0, 1, 2],
            [1, 6],
        ),
        # Sentences with other tokens are other inputs; a pair is one input.
        (
            "tags",
            {
                "train": [*TREES[1:], {"tokens": ["good", "tree"], "tags": ["O", "O"]}],
                "trusted": TREES[:1],
                "validation": TREES[1:2],
            },
            [0],
            [2],
        ),
        ("class", {"train": DAYS, "trusted": DAYS[1:2], "validation": [{**DAYS[1], "text": "bad"}]}, [0], [1]),
        # A prompt with several trusted answers is the same by its answer.
        ("text", {"train": ABS, "trusted": ABS[1:], "validation": [{**ABS[0], "prompt": "x"}]}, [0, 1], [1, 2]),
        # The input of a text is its prompt.
        *(
            ("text", {"train": [other, alike, other], "trusted": [row, row], "validation": [other]}, [0, 1], [1])
            for row, alike, other in FORMATS.values()
        ),
        *(
            ("text", {"train": [alike, other], "trusted": [row, other], "validation": [alike]}, [1], [1])
            for row, alike, other in FORMATS.values()
        ),
    ],
)
def test_trusted_rows_are_known_by_their_input(
    answer: str, files: Any, ids: list[int], same: list[int], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    writes = byte_tokenizer(chat_template=CHATML, eos="<|im_end|>") if answer == "text" else tokenizer
    data = prepared(tmp_path, writes, answer=answer, **files)
    assert data["trusted"].ids.tolist() == ids
    assert [row.cells for row in data["trusted"]] == [files["trusted"][j] for j in ids]
    assert marked(data) == same
    left_out = len(files["trusted"]) - len(ids)
    assert left_out == 0 or any(f"{left_out} of {len(files['trusted'])} trusted rows" in one for one in notes_of(data))


def test_what_is_held_out_of_the_training_rows_is_measured_on_too(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = prepared(tmp_path, tokenizer, train=POOL, trusted=POOL[:6])
    held_out = {row.cells["text"] for row in data["validation"]}
    retained = [row["text"] for row in POOL[:6] if row["text"] not in held_out]
    assert 0 < len(retained) < 6
    assert [row.cells["text"] for row in data["trusted"]] == retained
    assert f"{6 - len(retained)} of 6 trusted rows are left out" in notes_of(data)[0]


@pytest.mark.parametrize("trusted", [[0, 3], [3, 0, 0]])
def test_where_none_is_left_is_an_error(trusted: list[int], tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    measured, rows = [POOL[0], {**POOL[3], "label": 0}], [POOL[j] for j in trusted]
    with pytest.raises(DataError, match=r"trusted\.jsonl.* data\.trusted"):
        prepared(tmp_path, tokenizer, train=POOL, trusted=rows, validation=measured)


def test_rows_that_the_template_refuses_are_left_out_up_to_a_share(tmp_path: Path) -> None:
    """As Gemma's refuses a system prompt."""
    refuses = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    tokenizer, encode = byte_tokenizer(chat_template=refuses), task_for("text").reading.encode
    for systems, most in ((1, 0.1), (2, 0.1), (3, 0.1), (20, 1.0)):
        rows = [chat(*("s" * (j < systems)), f"u{j}", f"a{j}") for j in range(20)]
        train = read(write_jsonl(tmp_path / "train.jsonl", rows), answer="text", holds_out=False)["train"]
        how: dict[str, Any] = {"max_length": 200, "encode": encode, "most": most}
        if systems in (1, 2):
            with pytest.warns(UserWarning, match="System role not supported"):
                made = prepare_tables({"train": train}, tokenizer, **how)["train"]
            assert made.samples.ids.tolist() == [*range(systems, 20)]
            continue
        with pytest.raises(DataError, match=rf":1: .*System role not supported.*{systems} of 20 .*max_bad_rows"):
            prepare_tables({"train": train}, tokenizer, **how)
