"""Findings of rows among each other."""

import numpy as np

from tsqlora.text.among import among_rows
from tsqlora.text.conversations import Conversation, Message
from tsqlora.text.ledger import Line

WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrstp"]


def row(number: int, question: str, answer: str, rejected: str | None = None) -> Conversation:
    other = None if rejected is None else (Message("assistant", rejected),)
    return Conversation(number, (Message("user", question), Message("assistant", answer)), rejected=other)


def texts(n: int, length: int = 30, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, length)) for _ in range(n)]


def findings(rows: list[Conversation], evaluation: list[Conversation] | None = None) -> dict[str, list[int]]:
    lines = [Line(one.row, "") for one in rows]
    return {name: places for name, places in among_rows(rows, lines, evaluation).items() if places}


def test_different_rows_have_no_finding() -> None:
    questions, answers = texts(100), texts(100, seed=1)
    assert findings([row(j, q, a) for j, (q, a) in enumerate(zip(questions, answers, strict=True))]) == {}


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
    leak = Conversation(0, (Message("system", "Be brief."), *same.messages))
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
    assert findings([*even, row(60, questions[0], even[0].rejected[0].content, even[0].answer)]).get(
        "pair_conflict"
    ) == [
        0,
        60,
    ]  # type: ignore[index]
