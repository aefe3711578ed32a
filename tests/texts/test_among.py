"""Findings of rows among each other."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pytest

from linear import assert_linear, seconds
from tsqlora.auditing.texts.among import among_rows
from tsqlora.auditing.texts.ledger import Line
from tsqlora.rows.chat import Chat, Message

WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrstp"]


def row(number: int, question: str, answer: str, rejected: str | None = None) -> Chat:
    ask = Message("user", question)
    other = None if rejected is None else Chat((ask, Message("assistant", rejected)))
    return Chat((ask, Message("assistant", answer)), rejected=other, row=number)


def texts(n: int, length: int = 30, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, length)) for _ in range(n)]


def findings(rows: list[Chat], evaluation: list[Chat] | None = None) -> dict[str, list[int]]:
    lines = [Line(one.row, "") for one in rows]
    return {name: places for name, places in among_rows(rows, lines, evaluation).items() if places}


def test_different_rows_have_no_finding() -> None:
    questions, answers = texts(100), texts(100, seed=1)
    assert findings([row(j, q, a) for j, (q, a) in enumerate(zip(questions, answers, strict=True))]) == {}


def test_a_row_that_answers_with_its_question_is_no_copy_of_itself() -> None:
    questions = texts(40)
    assert "duplicate" not in findings([row(j, q, q) for j, q in enumerate(questions)])


class Read(Sequence[Chat]):
    """Rows that are read on access; counts those that somebody holds."""

    def __init__(self, questions: list[str]) -> None:
        self.questions, self.live = questions, WeakValueDictionary[int, Held]()
        self.most = 0

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, i: Any) -> Any:
        one = Held(row(i, self.questions[i], f"{self.questions[i]} {i}"))
        self.live[id(one)] = one
        self.most = max(self.most, len(self.live))
        return one


class Held(Chat):
    """A conversation that a weak reference may name."""

    __slots__ = ("__weakref__",)

    def __init__(self, one: Chat) -> None:
        Chat.__init__(self, one.messages, row=one.row)


def test_rows_are_read_one_after_another_and_none_is_held() -> None:
    rows = Read(texts(300))
    among_rows(rows, [Line(j, "") for j in range(len(rows))], [row(0, rows.questions[7], "")])
    assert rows.most < 8


def test_copies_are_found_exact_and_near_and_name_the_first() -> None:
    questions, answers = texts(20, 60), texts(20, 60, seed=1)
    rows = [row(j, q, a) for j, (q, a) in enumerate(zip(questions, answers, strict=True))]
    near = answers[4].split()
    near[30] = "other"
    rows += [row(20, questions[3], answers[3]), row(21, questions[4], " ".join(near))]
    lines = [Line(one.row, "") for one in rows]
    assert among_rows(rows, lines)["duplicate"] == [20, 21]
    assert (lines[20].fate, lines[21].fate) == ("duplicate of 3", "duplicate of 4")


def test_rows_of_the_evaluation_file_are_leaks_whatever_their_case_and_system_prompt() -> None:
    questions, answers = texts(20), texts(20, seed=1)
    rows = [row(j, q, a) for j, (q, a) in enumerate(zip(questions, answers, strict=True))]
    same = row(0, questions[7].upper(), f"  {answers[7]}\n")
    leak = Chat((Message("system", "Be brief."), *same.messages))
    assert findings(rows, [leak, row(1, "another question", "another answer")]) == {"eval_leak": [7]}


def test_one_prompt_with_far_answers_conflicts_unless_sampling_is_meant() -> None:
    questions, answers = texts(20), texts(20, seed=1)
    rows = [row(j, q, a) for j, (q, a) in enumerate(zip(questions, answers, strict=True))]
    assert findings([*rows, row(20, questions[0], "something else altogether")]) == {"conflicting_answers": [0, 20]}
    again = [
        row(20 + j, one.messages[0].content, a) for j, (one, a) in enumerate(zip(rows, texts(20, seed=2), strict=True))
    ]
    assert findings([*rows, *again]) == {}


def test_one_answer_for_many_prompts_is_boilerplate() -> None:
    rows = [
        row(j, question, "I cannot help with that." if j < 6 else f"answer {j}") for j, question in enumerate(texts(50))
    ]
    assert findings(rows) == {"one_answer": [*range(6)]}


def test_a_pair_and_its_reverse_conflict_and_longer_chosen_answers_are_noted() -> None:
    questions, a, b = texts(60), texts(60, 8, seed=1), texts(60, 20, seed=2)
    pairs = [row(j, q, one, two) for j, (q, one, two) in enumerate(zip(questions, b, a, strict=True))]
    assert findings(pairs) == {"length_bias": [*range(60)]}
    even = [row(j, q, *((x, y) if j % 2 else (y, x))) for j, (q, x, y) in enumerate(zip(questions, a, b, strict=True))]
    assert findings([*even, row(60, questions[0], even[0].rejected.answer, even[0].answer)]).get("pair_conflict") == [
        0,
        60,
    ]  # type: ignore[index]


@cache
def lives(n: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """Prompts and answers as people have them: lengths with heavy tails, words by Zipf's law, some answers equal."""
    rng = np.random.default_rng(seed)
    chances = 1 / np.arange(1, len(WORDS) + 1)
    lengths = rng.lognormal((3.2, 2.5), (1.0, 1.2), (n, 2)).astype(int).clip(1, 1000)
    texts = [[" ".join(rng.choice(WORDS, k, p=chances / chances.sum())) for k in pair] for pair in lengths]
    return [
        (f"{question} {j}", "no idea" if j % 7 == 0 else f"{answer} {j}") for j, (question, answer) in enumerate(texts)
    ]


ONE, OTHER, SCHEMA = texts(3, 200, seed=9)
SCHEMAS = texts(4, 150, seed=10)
CONSTANTS = {
    "nothing": lambda j, q, a: (q, a),
    "an instruction": lambda j, q, a: (f"{ONE}\n{q}", a),
    "an instruction behind": lambda j, q, a: (f"{q}\n{ONE}", a),
    "a template around": lambda j, q, a: (f"{ONE}: {q}\n{SCHEMA} {len(a)}?\n{OTHER}", a),
    "one schema, short questions": lambda j, q, a: (f"{SCHEMA}\n{' '.join(q.split()[-8:])}", a),
    "a schema for many rows": lambda j, q, a: (f"{SCHEMAS[j % 4]}\n{' '.join(q.split()[-8:])}", f"select {j % 3}"),
    "classes": lambda j, q, a: (f"{ONE}\n{q}\n{OTHER}", ("yes", "no")[j % 2]),
    "two tasks on the same texts": lambda j, q, a: (f"{(ONE, OTHER)[j % 2]}\n{q.rpartition(' ')[0]} {j // 2}", "yes"),
    "one answer": lambda j, q, a: (q, "I don't know."),
    "one prompt": lambda j, q, a: (ONE, f"{a} {j}"),
    "a long beginning of all answers": lambda j, q, a: (q, f"{ONE} {a}"),
    "texts alone": lambda j, q, a: ("", f"{ONE} {q}"),
}


def table(n: int, constant: str) -> list[Chat]:
    return [row(j, *CONSTANTS[constant](j, q, a)) for j, (q, a) in enumerate(lives(n))]


def changed(text: str, at: int = -30) -> str:
    """The text with another word."""
    words = text.split(" ")
    words[at] = "another"
    return " ".join(words)


@pytest.mark.parametrize("n", [12, 300])
@pytest.mark.parametrize("constant", CONSTANTS)
def test_what_the_whole_table_has_makes_no_duplicates(n: int, constant: str) -> None:
    assert "duplicate" not in findings(table(n, constant))


@pytest.mark.parametrize(
    "constant", [name for name in CONSTANTS if "short" not in name and "prompt" not in name and "schema" not in name]
)
def test_what_the_whole_table_has_hides_no_duplicate(constant: str) -> None:
    question, answer = texts(2, 60, seed=3)
    copies = [CONSTANTS[constant](0, one, answer) for one in (question, changed(question), question)]
    rows = table(300, constant) + [row(300 + j, *one) for j, one in enumerate(copies)]
    assert findings(rows)["duplicate"] == [301, 302]
    served = [replace(one, messages=(Message("system", SCHEMA), *one.messages)) for one in rows]
    assert findings(served)["duplicate"] == [301, 302]


def test_rows_that_differ_in_what_matters_are_no_copies() -> None:
    question, answer = texts(2, 60, seed=3)
    call = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in ("near", "far")]
    calls = [Message("assistant", "", {"tool_calls": [one]}) for one in call]
    different = [
        [row(0, question, answer), row(1, question, "no"), row(2, changed(question), "no, never")],
        [row(0, "What is 2 + 2?", "4"), row(1, "What is 2 * 2?", "4")],
        [row(0, "Capitalise: paris", "Paris"), row(1, "Capitalise: PARIS", "Paris")],
        [replace(row(j, question, ""), messages=(Message("user", question), one)) for j, one in enumerate(calls)],
        [row(0, question, answer, OTHER), row(1, question, OTHER, answer)],
    ]
    for rows in different:
        assert "duplicate" not in findings(rows)


QUESTION = "How far is it from the town hall of Oslo to the harbour, by bus?"
CHINESE = "从奥斯陆市政厅到港口坐公共汽车有多远需要多少时间"


@pytest.mark.parametrize(
    ("prompts", "question", "answer"),
    [
        ([QUESTION], QUESTION, "other words"),
        ([QUESTION], f"Answer these. {QUESTION.lower()} Then say why.", "x"),
        ([QUESTION], "Tell me something.", f"They asked: {QUESTION} Nobody knew."),
        ([f"{ONE}\n{text}" for text in (QUESTION, *texts(30))], QUESTION, "x"),
        ([f"{ONE}\n{text}" for text in (QUESTION, *texts(30))], f"{ONE}\n{QUESTION}", "x"),
        ([texts(1, 60)[0]], changed(texts(1, 60)[0]), "x"),
        (["How many legs has a spider?"], "Q: How many legs has a spider? A:", "Eight."),
        ([CHINESE], f"请回答:{CHINESE}?谢谢", "x"),
    ],
)
def test_a_prompt_of_the_evaluation_file_inside_a_row_is_a_leak_and_is_shown(
    prompts: list[str], question: str, answer: str
) -> None:
    rows = [*table(60, "an instruction"), row(60, question, answer)]
    lines = [Line(one.row, "") for one in rows]
    evaluation = [row(j, prompt, "the right one") for j, prompt in enumerate(prompts)]
    assert among_rows(rows, lines, evaluation)["eval_leak"] == [60]
    shown = lines[60].detail.casefold()
    assert len(shown) < 300
    assert any(words.casefold() in shown for words in (QUESTION[:-1], CHINESE, "How many legs has a spider", "another"))


@pytest.mark.parametrize("constant", CONSTANTS)
def test_what_many_rows_have_is_no_leak(constant: str) -> None:
    rows, short = table(300, constant), ["Summarize the text.", "Hi", "", ONE, OTHER, "Compute 3 + 4 * 5 - 2"]
    rows += [row(300, "Compute 3 - 4 + 5 * 2", "9"), row(301, f"Summarize the text. {QUESTION}", "short")]
    others = [row(j, CONSTANTS[constant](j, q, a)[0], "x") for j, (q, a) in enumerate(lives(40, seed=5))]
    unlike = [one for one in others if len(one.question[0].content.split()) > 8]
    assert "eval_leak" not in findings(rows, [*unlike, *(row(90 + j, text, "y") for j, text in enumerate(short))])


def test_a_prompt_that_was_answered_many_times_is_one_leak_and_an_instruction_alone_is_none() -> None:
    prompts, answers = texts(10), texts(160, seed=1)
    sampled = [row(j, prompts[j % 10], answers[j]) for j in range(160)]
    assert findings(sampled, [row(0, prompts[4], "x")])["eval_leak"] == [*range(4, 160, 10)]
    served = [
        replace(one, messages=(Message("system", one.question[0].content), Message("user", ONE), one.messages[-1]))
        for one in sampled
    ]
    assert "eval_leak" not in findings(served[:100], [replace(one, row=j) for j, one in enumerate(served[100:110])])


@pytest.mark.parametrize(
    "constant", ["an instruction", "one schema, short questions", "one answer", "one prompt", "equal"]
)
def test_twice_the_rows_take_twice_the_time(constant: str) -> None:
    rows = [row(j, ONE, OTHER) for j in range(2000)] if constant == "equal" else table(2000, constant)
    findings(rows[:500], rows[:125])
    assert_linear(lambda n: seconds(lambda: findings(rows[:n], rows[: n // 4])), 500)
