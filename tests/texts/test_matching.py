"""Each prepared sequence finds the row that it was made of, and no other."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import cycle, product
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import normalizers

from families import FAMILIES, tokenizer_of
from linear import assert_linear, seconds
from tsqlora.auditing.texts.ledger import LEAST_KNOWN, Line, line_of
from tsqlora.auditing.texts.prepared import Trained
from tsqlora.auditing.texts.reconcile import audit_sequences, match
from tsqlora.auditing.texts.vocabulary import vocabulary_of
from tsqlora.rows.chat import Chat
from tsqlora.rows.chat import Message as Turn
from tsqlora.tasks.generation import IGNORED

TOKENIZER = tokenizer_of(FAMILIES["qwen 2.5"])
VOCABULARY = vocabulary_of(TOKENIZER)
ROLES = ("user", "assistant")
INSTRUCTION = "Read the letter. Find out what its writer wants, and answer: be brief, be kind.\n\n"
LETTERS = {"latin": "aeioudlmnrstk", "thai": "กขคงจชซดตถทนบปผพมยรลวสหอ", "han": "天气河流城市学校冬夏山水人家大小"}
ENDS = {"latin": ["", "", "", ",", "."], "thai": [""], "han": ["", "", "，", "。"]}
CONSTANTS = {
    "none": "{question}",
    "instruction": INSTRUCTION + "{question}",
    "around": "Is this review good?\n{question}\nAnswer yes or no.",
}


@cache
def drawn(constant: str, script: str, count: int = 150) -> list[Chat]:
    """Rows of one, two or three exchanges, of lengths with a heavy tail; some answers are those of many rows."""
    rng, rows = np.random.default_rng(len(constant) + len(script)), list[Chat]()
    words = ["".join(rng.choice([*LETTERS[script]], int(rng.integers(2, 7)))) for _ in range(500)]

    def text(most: int) -> str:
        chosen = rng.choice(words, min(int(rng.lognormal(2.5, 1)) + 1, most))
        return ("" if script == "thai" else " ").join(word + str(rng.choice(ENDS[script])) for word in chosen)

    for j in range(count):
        contents = list[str]()
        for k in range(int(rng.choice([1, 1, 2, 3]))):
            question = f"{text(12)} {j}-{k} {text(40)}"
            answer = "Yes." if rng.random() < 0.3 else f" {text(300)} {j}"
            contents += [CONSTANTS[constant].format(question=question), answer]
        rows.append(Chat(tuple(map(Turn, ROLES * 3, contents)), row=j))
    return rows


def sequence(one: Chat, keep: slice = slice(None), tokenizer: Any = TOKENIZER) -> Trained:
    chat = [{"role": message.role, "content": message.content} for message in one.messages]
    ids = np.array(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"])[keep]
    return Trained(ids, np.full(len(ids), IGNORED), one.row)


NAMES = cycle(["llama 3", "qwen 3, thinking", "mistral", "zephyr"])


@pytest.mark.parametrize(
    ("keep", "constant", "script", "name"),
    [
        (keep, *both, next(NAMES))
        for keep in (slice(None), slice(-30))
        for both in (*product(CONSTANTS, ["latin"]), ("none", "thai"), ("around", "han"))
    ],
)
def test_each_sequence_comes_back_to_its_row(name: str, keep: slice, constant: str, script: str) -> None:
    rows, tokenizer = drawn(constant, script), tokenizer_of(FAMILIES[name])
    made = [sequence(row, keep, tokenizer) for row in rows]
    order = np.random.default_rng(0).permutation(len(made))
    taken, sure, left = match(rows, [made[j] for j in order], vocabulary_of(tokenizer))
    assert ({*sure.values()}, left) == ({"exact"}, [])
    wrong = [j for j, one in enumerate(made) if taken[j] != [one]]
    assert len(wrong) <= (keep.stop is not None) * 0.03 * len(rows), "more than what several rows begin with"


def test_rows_with_one_instruction_are_matched_in_linear_time() -> None:
    rules = Turn("system", " ".join(f"Rule {k} is for all." for k in range(40)))
    rows = [replace(row, messages=(rules, *row.messages)) for row in drawn("none", "latin", 800)]
    made = [sequence(row) for row in rows]
    assert_linear(lambda n: seconds(lambda: match(rows[:n], made[:n], VOCABULARY)), 200)


def test_a_completion_that_ends_its_prompts_sentence_is_of_its_row() -> None:
    rows = [Chat((Turn("user", f"The opposite of {j} is"), Turn("assistant", f" {-j}")), row=j) for j in range(99)]
    made = [
        Trained(ids := np.array(TOKENIZER(one.whole[0].content + one.answer)["input_ids"]), ids, one.row)
        for one in rows
    ]
    taken, _, left = match(rows, made, VOCABULARY)
    assert (len(taken), left) == (99, [])


def test_a_piece_that_packing_cut_has_no_row() -> None:
    rows, cut = drawn("none", "latin"), {*range(0, 150, 7)}
    made = [sequence(row, slice(-30 if row.row in cut else None)) for row in rows]
    taken, _, left = match(rows, made, VOCABULARY, packed=True)
    assert ({*taken}, [one.row for one in left]) == ({*range(150)} - cut, sorted(cut))


@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("split", [False, True])
def test_packing_that_cuts_at_a_limit_is_no_packing_that_splits(split: bool, constant: str) -> None:
    rows = drawn(constant, "latin")
    made = [sequence(row) for row in rows]
    limit = int(np.quantile([len(one.ids) for one in made], 0.8))
    # Of rows that are hardly longer, only the template's end may be cut.
    made = [one for one in made if not limit < len(one.ids) <= limit + LEAST_KNOWN]
    long = {one.row for one in made if len(one.ids) > limit}
    starts = [range(0, len(one.ids) if split else 1, limit) for one in made]
    pieces = [replace(one, ids=one.ids[k : k + limit]) for one, own in zip(made, starts, strict=True) for k in own]
    taken, _, left = match(rows, pieces, VOCABULARY, packed=True)
    assert {one.row for one in left} == (long if split else set())
    assert {j: [one.row for one in own] for j, own in taken.items()} == {
        one.row: [one.row] for one in made if not split or one.row not in long
    }


@pytest.mark.parametrize("constant", CONSTANTS)
def test_what_is_of_no_row_is_left(constant: str) -> None:
    rows, others = drawn(constant, "latin"), drawn(constant, "han", 60)
    strangers = [sequence(one, tokenizer=TOKENIZER) for one in others]
    missing = {*range(0, len(rows), 7)}
    made = [sequence(row) for row in rows if row.row not in missing]
    taken, _, left = match(rows, [*strangers, *made], VOCABULARY)
    assert ({*taken}, left) == ({*range(len(rows))} - missing, strangers)


def test_equal_rows_share_their_sequences_by_count() -> None:
    sky = [(0, ("What is the colour of the sky?", "It is blue, mostly.")), (1, ("short", "yes"))]
    rows = [Chat(tuple(map(Turn, ROLES, own)), row=j) for j, own in [*sky, (2, sky[0][1])]]
    taken, sure, left = match(rows, [sequence(rows[0]), sequence(rows[1]), sequence(rows[0])], VOCABULARY)
    assert {j: len(own) for j, own in taken.items()} == {0: 1, 1: 1, 2: 1}
    assert (sure, left) == ({0: "ambiguous", 1: "exact", 2: "ambiguous"}, [])


def test_of_the_copies_of_a_row_the_worst_is_reconciled() -> None:
    rows = drawn("none", "latin", 12)
    made = [replace(one, targets=one.ids) for one in map(sequence, rows)]
    limit = sorted(len(one.ids) for one in made)[6]
    cut = [replace(one, ids=one.ids[:limit], targets=one.targets[:limit]) for one in made]
    for copies in (cut[:3], made[:3]):  # cut in the same place, or not at all
        data = [{"messages": [one.whole for one in row.messages]} for row in rows]
        once, twice = (audited(some, data) for some in (cut, [*cut, *copies]))
        assert [line.copies for line in twice] == [1, 1, 1] + [0] * 9
        assert [replace(line, copies=0) for line in twice] == once


def audited(sequences: Sequence[Trained], data: Any) -> list[Line]:
    made = [{"input_ids": one.ids.tolist(), "labels": one.targets.tolist()} for one in sequences]
    return audit_sequences(Dataset.from_list(made), None, VOCABULARY, data=data).lines


def talk(exchanges: int) -> Chat:
    contents = [(f"Question {k} of our long talk, please?", f"Answer {k} in our long talk.") for k in range(exchanges)]
    return Chat(tuple(map(Turn, ROLES * exchanges, sum(contents, ()))), row=exchanges)


def test_rows_that_begin_alike_have_a_sequence_each() -> None:
    rows = [talk(k) for k in range(1, 13)]
    whole, cut = ([sequence(one, keep) for one in rows] for keep in (slice(None), slice(100)))
    for order in ([*range(12)], [*range(11, -1, -1)], np.random.default_rng(0).permutation(12).tolist()):
        taken, _, left = match([rows[j] for j in order], whole, VOCABULARY)
        assert ({order[j]: parts for j, parts in taken.items()}, left) == (
            {j: [one] for j, one in enumerate(whole)},
            [],
        )
    taken, *_ = match(rows[1:], cut[1:], VOCABULARY)
    assert {j: len(own) for j, own in taken.items()} == dict.fromkeys(range(11), 1)


def test_both_sides_of_a_pair_find_the_row_that_has_both() -> None:
    question, chosen, rejected = "How far is it to the sea?", ("It is near.", "One hour."), ("No idea.", "Ask others.")
    answers: Sequence[tuple[str, str]] = [(a, b) for a in chosen for b in rejected]
    pairs = [
        Chat(
            (Turn("user", question), Turn("assistant", a)),
            rejected=Chat((Turn("user", question), Turn("assistant", b))),
            row=k,
        )
        for k, (a, b) in enumerate(answers)
    ]
    made = list[Trained]()
    for place, k in enumerate((2, 0, 3, 1)):
        other = replace(pairs[k], messages=pairs[k].side("rejected"))
        made += [
            replace(sequence(one), row=place, side=side) for one, side in ((pairs[k], "chosen"), (other, "rejected"))
        ]
    taken, *_ = match(pairs, made, VOCABULARY)
    assert {j: [one.row for one in own] for j, own in taken.items()} == {2: [0, 0], 0: [1, 1], 3: [2, 2], 1: [3, 3]}


def test_contents_are_compared_in_the_form_that_the_tokenizer_gives_them() -> None:
    tokenizer = tokenizer_of(FAMILIES["qwen 2.5"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
    texts = [(f"Wie heißt Stadt {k} in Österreich?", f"Stadt {k} heißt Mödling, südlich von Wien.") for k in range(3)]
    rows, composed = (
        [
            Chat(tuple(Turn(r, normalize(form, t)) for r, t in zip(ROLES, own, strict=True)), row=k)
            for k, own in enumerate(texts)
        ]
        for form in ("NFD", "NFC")
    )
    whole = [sequence(one) for one in composed]
    taken, sure, left = match(rows, whole, vocabulary := vocabulary_of(tokenizer))
    assert (taken, [*sure.values()], left) == ({k: [one] for k, one in enumerate(whole)}, ["exact"] * 3, [])
    lines = [line_of(one, taken[one.row], vocabulary) for one in rows]
    assert [(line.findings, line.lost_tokens) for line in lines] == [(["nothing_trained"], 0)] * 3


def test_a_tool_result_that_the_template_writes_as_json_is_there() -> None:
    tokenizer = tokenizer_of(FAMILIES["qwen 2.5"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}"
    )
    roles = ("user", "assistant", "tool", "assistant")
    turns = [(f"How warm is town {k}?", "", f'{{"temp": "{k} °C"}}', f"It is {k} degrees.") for k in range(4)]
    rows = [Chat(tuple(map(Turn, roles, own)), row=k) for k, own in enumerate(turns)]
    whole = [sequence(one, tokenizer=tokenizer) for one in rows]
    taken, *_ = match(rows, whole, VOCABULARY)
    assert taken == {k: [one] for k, one in enumerate(whole)}
    assert all("content_lost" not in line_of(one, taken[one.row], VOCABULARY).findings for one in rows)
    between = (Turn("assistant", "Let me see.", {"tool_calls": [{}]}), Turn("tool", "of another form"))
    other = [replace(one, messages=(one.messages[0], *between, one.messages[3])) for one in rows]
    assert match(other, whole, VOCABULARY)[0] == taken
