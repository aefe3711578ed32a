"""A prepared set without its source rows is read by its labels: they say where the answers are."""

from collections import defaultdict
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from families import FAMILIES, tokenizer_of
from masked import SPECIAL, chats, masked, tokens
from runs import write_jsonl
from tsqlora.auditing.texts.among import among_rows
from tsqlora.auditing.texts.findings import OF_LABELS, OF_TOKENS
from tsqlora.auditing.texts.reconcile import Reconciled, audit_sequences, conversations_of
from tsqlora.auditing.texts.vocabulary import vocabulary_of
from tsqlora.errors import DataError

ROWS, PLANTED = 40, 3
MASKS = ("answers", "everything", "all turns")


def places(result: Reconciled) -> dict[str, list[int]]:
    """Rows by finding, but for the note that prompts are trained."""
    rows = defaultdict[str, list[int]](list)
    for line in result.lines:
        for name in line.findings:
            rows[name].append(line.row)
    rows |= {name: group for name, group in among_rows(result.rows, result.lines).items() if group}
    rows.pop("prompt_trained", None)
    return dict(rows)


def read(made: list[dict[str, Any]], tokenizer: Any, **options: Any) -> Reconciled:
    stops = vocabulary_of(tokenizer).stops
    return audit_sequences(Dataset.from_list(made), None, vocabulary_of(tokenizer, generation_ends=stops), **options)


@pytest.mark.parametrize(
    ("name", "mask"), [*product(FAMILIES, MASKS[:1]), *product(("llama 3", "qwen 3, thinking"), MASKS[1:])]
)
def test_faults_that_labels_show_are_found_in_their_rows_and_no_others(name: str, mask: str) -> None:
    tokenizer, rows = tokenizer_of(FAMILIES[name]), chats(ROWS)
    assert places(read([masked(tokenizer, row, mask) for row in rows], tokenizer)) == {}
    empty = range(10, 10 + PLANTED) if mask != "everything" else range(0)  # whose labels do not show where answers are
    unstopped = range(20, 20 + PLANTED)
    for j in empty:
        rows[j] = [*rows[j][:-1], {"role": "assistant", "content": ""}]
    rows += rows[:PLANTED]
    made = [
        masked(tokenizer, row, "answers without stop" if mask == "answers" else "everything without stop")
        if j in unstopped
        else masked(tokenizer, row, mask)
        for j, row in enumerate(rows)
    ]
    result = read(made, tokenizer)
    expected = {"empty_answer": [*empty], "stop_not_trained": [*unstopped], "duplicate": [*range(ROWS, len(rows))]}
    assert places(result) == {finding: group for finding, group in expected.items() if group}
    trained = [sum(label != SPECIAL for label in one["labels"][1:]) for one in made]
    assert [line.trained_tokens for line in result.lines] == trained


@pytest.mark.parametrize("name", FAMILIES)
def test_a_set_without_any_stop_lacks_it_in_every_row(name: str) -> None:
    tokenizer = tokenizer_of(FAMILIES[name])
    result = read([masked(tokenizer, row, "answers without stop") for row in chats(ROWS)], tokenizer)
    assert places(result) == {"stop_not_trained": [*range(ROWS)]}


@pytest.mark.parametrize(("name", "source"), [*zip(FAMILIES, cycle([False, True]), strict=False)])
def test_trained_prompts_with_masked_answers_train_nothing(name: str, source: bool) -> None:
    tokenizer, rows = tokenizer_of(FAMILIES[name]), chats(ROWS)
    data = [{"messages": row} for row in rows] if source else None
    result = read([masked(tokenizer, row, "prompts") for row in rows], tokenizer, data=data)
    assert places(result)["nothing_trained"] == [*range(ROWS)]
    assert {line.fate for line in result.lines} == {"nothing to train"}


def test_rows_at_the_limit_without_a_stop_are_cut() -> None:
    tokenizer, rows = tokenizer_of(FAMILIES["llama 3"]), chats(ROWS)
    made = [masked(tokenizer, row) for row in rows]
    limit = int(np.quantile([len(one["input_ids"]) for one in made], 0.8))
    cut = [j for j, one in enumerate(made) if len(one["input_ids"]) > limit]
    short = [{name: values[:limit] for name, values in one.items()} for one in made]
    by_name = places(read(short, tokenizer))
    inside = [j for j in cut if short[j]["labels"][-1] not in (SPECIAL, tokenizer.eos_token_id)]
    assert by_name.pop("answer_cut") == inside
    assert by_name.keys() <= {"nothing_trained"}, "where the limit took more than the end of an answer"


def test_sequences_that_share_a_row_are_rows_of_their_own() -> None:
    tokenizer, rows = tokenizer_of(FAMILIES["qwen 2.5"]), chats(ROWS)
    rows[7] = [*rows[7][:-1], {"role": "assistant", "content": ""}]
    rows[33] = rows[32]
    parts = [masked(tokenizer, row) for row in rows]
    made = [
        {
            "input_ids": [j for one in parts[k : k + 3] for j in one["input_ids"]],
            "labels": [j for one in parts[k : k + 3] for j in one["labels"]],
            "seq_lengths": [len(one["input_ids"]) for one in parts[k : k + 3]],
        }
        for k in range(0, ROWS, 3)
    ]
    result = read(made, tokenizer)
    assert places(result) == {"empty_answer": [7], "duplicate": [33]}
    assert {one.row for one in result.of([7])[7]} == {7}


def test_pairs_are_read_on_both_sides() -> None:
    tokenizer, rows = tokenizer_of(FAMILIES["qwen 2.5"]), chats(12)
    end = tokens(tokenizer, "<|im_end|>")
    made = [
        {
            "prompt_ids": tokens(
                tokenizer, f"<|im_start|>user\n{row[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
            ),
            "chosen_ids": tokens(tokenizer, row[1]["content"]) + end,
            "rejected_ids": tokens(tokenizer, "I do not know." if j else row[1]["content"]) + end * (j != 3),
        }
        for j, row in enumerate(rows)
    ]
    assert places(read(made, tokenizer)) == {"pair_equal": [0], "stop_not_trained": [3]}
    made[5] |= {"rejected_ids": []}
    assert places(read(made, tokenizer)) == {"pair_equal": [0], "stop_not_trained": [3], "empty_answer": [5]}


def test_parts_of_a_stream_say_nothing_of_rows() -> None:
    tokenizer = tokenizer_of(FAMILIES["qwen 2.5"])
    stream = [j for row in chats(ROWS) for j in masked(tokenizer, row)["input_ids"]]
    result = read([{"input_ids": stream[k : k + 64]} for k in range(0, len(stream), 64)], tokenizer)
    assert (places(result), result.finds) == ({}, OF_TOKENS)


def test_all_findings_are_possible_only_with_texts(tmp_path: Path) -> None:
    tokenizer, rows = tokenizer_of(FAMILIES["qwen 2.5"]), [{"messages": row} for row in chats(ROWS)]
    made = [masked(tokenizer, row["messages"]) for row in rows]
    assert read(made, tokenizer).finds == OF_LABELS
    assert {*read(made, tokenizer, data=write_jsonl(tmp_path / "rows.jsonl", rows)).finds} > OF_LABELS


def test_prompts_alone_are_rows_to_evaluate_on_and_no_source_rows() -> None:
    rows = [{"prompt": f"Why {j}?", "gold": "So."} for j in range(3)]
    chats_read = conversations_of(rows, answers=False)
    assert chats_read is not None
    assert [[message.content for message in one.whole] for one in chats_read] == [[row["prompt"]] for row in rows]
    with pytest.raises(DataError, match="no columns of any row format"):
        conversations_of(rows)
