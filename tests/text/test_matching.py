"""Each prepared sequence finds the row that it was made of."""

from dataclasses import replace
from typing import Any
from unicodedata import normalize

import numpy as np
from tokenizers import normalizers

from families import FAMILIES, tokenizer_of
from tsqlora.tasks.generation import IGNORED
from tsqlora.text.conversations import Conversation, Message
from tsqlora.text.ledger import line_of
from tsqlora.text.matching import match, unwrapped
from tsqlora.text.prepared import Trained
from tsqlora.text.vocabulary import vocabulary_of

TOKENIZER = tokenizer_of(FAMILIES["qwen 2.5"])
VOCABULARY = vocabulary_of(TOKENIZER)


def row(number: int, *contents: str) -> Conversation:
    roles = ("system", "user", "assistant")
    return Conversation(number, tuple(map(Message, roles, ("Be brief and kind to people.", *contents))))


def sequence(one: Conversation, keep: slice = slice(None), tokenizer: Any = TOKENIZER) -> Trained:
    chat = [{"role": message.role, "content": message.content} for message in one.messages]
    ids = np.array(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"])[keep]
    return Trained(ids, np.full(len(ids), IGNORED), 0)


def test_shuffled_cut_and_missing_rows_are_told_apart() -> None:
    rows = [
        row(j, f"How far is it from town {j} to the sea, on foot?", f"It is {j * 7} kilometres, on foot.")
        for j in range(40)
    ]
    order = np.random.default_rng(0).permutation(40)[:30]
    sequences = [sequence(rows[j], slice(0, -20) if j % 2 else slice(None)) for j in order]
    stranger = sequence(row(0, "a question of another file altogether", "and the answer to it, of course"))
    taken, sure, left = match(rows, [*sequences, stranger], VOCABULARY)
    assert {j: len(own) for j, own in taken.items()} == dict.fromkeys(map(int, order), 1)
    assert all(taken[j][0] is one for j, one in zip(map(int, order), sequences, strict=True))
    assert {*sure.values()} == {"exact"}
    assert left == [] or left == [stranger]


def test_equal_rows_share_their_sequences_by_count() -> None:
    rows = [row(0, "What is the colour of the sky?", "It is blue, mostly."), row(1, "short", "yes")]
    rows += [row(2, "What is the colour of the sky?", "It is blue, mostly.")]
    taken, sure, left = match(rows, [sequence(rows[0]), sequence(rows[1]), sequence(rows[0])], VOCABULARY)
    assert {j: len(own) for j, own in taken.items()} == {0: 1, 1: 1, 2: 1}
    assert (sure, left) == ({0: "ambiguous", 1: "exact", 2: "ambiguous"}, [])


def talk(exchanges: int) -> Conversation:
    contents = [(f"Question {k} of our long talk, please?", f"Answer {k} in our long talk.") for k in range(exchanges)]
    return Conversation(exchanges, tuple(map(Message, ("user", "assistant") * exchanges, sum(contents, ()))))


def test_a_row_that_begins_another_one_has_its_own_sequence() -> None:
    rows = [talk(k) for k in range(1, 13)]
    whole = [sequence(one) for one in rows]
    for order in ([*range(12)], [*range(11, -1, -1)], np.random.default_rng(0).permutation(12).tolist()):
        taken, _, left = match([rows[j] for j in order], whole, VOCABULARY)
        assert {order[j]: parts for j, parts in taken.items()} == {j: [one] for j, one in enumerate(whole)}
        assert not left


def test_rows_that_a_cut_makes_alike_have_a_sequence_each() -> None:
    rows = [talk(k) for k in range(2, 14)]
    taken, *_ = match(rows, [sequence(one, slice(100)) for one in rows], VOCABULARY)
    assert {j: len(own) for j, own in taken.items()} == dict.fromkeys(range(12), 1)


def test_both_sides_of_a_pair_find_the_row_that_has_both() -> None:
    question, chosen, rejected = "How far is it to the sea?", ("It is near.", "One hour."), ("No idea.", "Ask others.")
    pairs = [row(k, question, a) for k, a in enumerate(a for a in chosen for _ in rejected)]
    pairs = [replace(one, rejected=(Message("assistant", b),)) for one, b in zip(pairs, rejected * 2, strict=True)]
    made = list[Trained]()
    for place, k in enumerate((2, 0, 3, 1)):
        other = replace(pairs[k], messages=(*pairs[k].question, *(pairs[k].rejected or ())))
        made += [replace(sequence(pairs[k]), row=place, side="chosen")]
        made += [replace(sequence(other), row=place, side="rejected")]
    taken, *_ = match(pairs, made, VOCABULARY)
    assert {j: [one.row for one in own] for j, own in taken.items()} == {2: [0, 0], 0: [1, 1], 3: [2, 2], 1: [3, 3]}


def test_contents_are_compared_in_the_form_that_the_tokenizer_gives_them() -> None:
    tokenizer = tokenizer_of(FAMILIES["qwen 2.5"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
    contents = [
        (f"Wie heißt Stadt {k} in Österreich?", f"Stadt {k} heißt Mödling, südlich von Wien.") for k in range(3)
    ]
    rows = [row(k, *(normalize("NFD", content) for content in own)) for k, own in enumerate(contents)]
    whole = [replace(sequence(row(k, *own)), row=k) for k, own in enumerate(contents)]
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
    rows = [Conversation(k, tuple(map(Message, roles, own))) for k, own in enumerate(turns)]
    whole = [replace(sequence(one, tokenizer=tokenizer), row=one.row) for one in rows]
    taken, *_ = match(rows, whole, VOCABULARY)
    assert taken == {k: [one] for k, one in enumerate(whole)}
    assert all("content_lost" not in line_of(one, taken[one.row], VOCABULARY).findings for one in rows)
    (stream,) = unwrapped(rows[:1], [Trained(whole[0].ids, whole[0].targets, 0)], VOCABULARY)
    assert len(stream.ids) == len(whole[0].ids) - 1  # without the line feed behind the stop
    between = (Message("assistant", "Let me see.", {"tool_calls": [{}]}), Message("tool", "of another form"))
    other = [replace(one, messages=(one.messages[0], *between, one.messages[3])) for one in rows]
    assert match(other, whole, VOCABULARY)[0] == taken
