"""Rows of texts, as the columns of well-known sets have them, and the faults that are planted in them."""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from days.values import NAMES, TOWNS, VALUES, log_normal, text_of, words

Row = dict[str, Any]
CHATS = ("chat", "tools", "reasoning", "sharegpt", "prompt chat")
"""Kinds whose rows are messages, which need a chat template."""
FLAT = ("prompt", "alpaca", "orca", "math", "turns", "text", "summary", "pairs")
"""Kinds whose cells are texts alone, as CSV files hold them."""
TEXTS = (*CHATS, *FLAT, "squad", "pair chats")
INSTRUCTION = (
    "You are a careful assistant of the town hall. Read the letter below, find out what its writer wants, and answer "
    "in the tone of an official who has time. Name the office that is responsible, its opening hours, and the papers "
    "that the writer must bring. Never promise what the law does not allow, and never invent a name or a number. If "
    "the letter asks for more than one thing, answer each in a separate paragraph, in the order of the letter."
)
SCHEMA = (
    "CREATE TABLE people (id INT PRIMARY KEY, name TEXT, town TEXT, born DATE); CREATE TABLE towns (name TEXT, people "
    "INT, country TEXT); CREATE TABLE trips (person INT REFERENCES people(id), town TEXT, day DATE, price NUMERIC); "
    "CREATE TABLE letters (id INT, sender INT, receiver INT, sent TIMESTAMP, body TEXT);\nQuestion: "
)
SYSTEM = "You are a helpful assistant. Answer in the user's language, and be brief."
KEYS = ("reasoning_content", "reasoning", "thinking", "inline", "inline, one line feed", "inline, none")
"""Where the reasoning of an answer stands: under a key, or before the answer, with so many line feeds behind it."""


@dataclass(slots=True)
class Maker:
    """Draws the texts of one day's rows."""

    rng: random.Random
    script: str
    lengths: str | int
    constant: str
    count: Callable[[str], int]
    key: str = "inline"

    def tokens(self) -> int:
        if isinstance(self.lengths, int):
            return max(4, self.lengths + self.rng.choice((0, 0, -1, 1)))
        return max(4, log_normal(self.rng))

    def question(self, k: int) -> str:
        who = f"{self.rng.choice(NAMES)} from {self.rng.choice(TOWNS)} asks about number {k}: "
        text = who + words(self.rng, self.script, self.rng.randint(5, 30))
        before = {"instruction": f"{INSTRUCTION}\n\n", "schema": SCHEMA}.get(self.constant, "")
        return before + text

    def answer(self, k: int) -> str:
        return text_of(self.rng, self.script, self.tokens(), self.count, f"{k * 37 % 1009} {self.rng.choice(TOWNS)}")

    def system(self, k: int) -> str:
        return SYSTEM if self.constant == "system" else f"{SYSTEM} Today is day {k}."


def _exchange(
    make: Maker, k: int, names: Sequence[str] = ("user", "assistant"), keys: str = "role content"
) -> list[Row]:
    role, content = keys.split()
    turns = list[Row]()
    for turn in range(make.rng.choice((1, 1, 1, 2, 3))):
        texts = (make.question(1000 * turn + k), make.answer(1000 * turn + k))
        turns += [{role: name, content: text} for name, text in zip(names, texts, strict=True)]
    return turns


def _chat(make: Maker, k: int) -> Row:
    system = [{"role": "system", "content": make.system(k)}] if make.constant == "system" else []
    return {"messages": [*system, *_exchange(make, k)]}


def _tools(make: Maker, k: int) -> Row:
    properties = {"town": {"type": "string"}, "day": {"type": "string"}}
    name = make.rng.choice(("get_weather", "get_trains", "lookup"))
    tool = {"name": name, "description": f"Look up {name[4:] or 'it'}.", "parameters": {"type": "object"}}
    tool["parameters"] |= {"properties": properties, "required": ["town"]}
    call = {"name": name, "arguments": {"town": make.rng.choice(TOWNS), "day": None if k % 5 == 4 else f"day {k}"}}
    number = f"{k:09d}"
    content = (None, "", "Let me look that up.")[k % 3]
    return {
        "messages": [
            *([{"role": "system", "content": make.system(k)}] if make.constant == "system" else []),
            {"role": "user", "content": make.question(k)},
            {
                "role": "assistant",
                "content": content,
                "tool_calls": [{"id": number, "type": "function", "function": call}],
            },
            {
                "role": "tool",
                "tool_call_id": number,
                "name": name,
                "content": f'{{"degrees": {k % 60}, "sky": "grey"}}',
            },
            {"role": "assistant", "content": make.answer(k)},
        ],
        "tools": [{"type": "function", "function": tool}],
    }


def _reasoning(make: Maker, k: int) -> Row:
    turns = _exchange(make, k)
    for turn in turns[1::2]:
        thought = f"The question is number {k}. {words(make.rng, make.script, make.rng.randint(3, 40))}"
        if make.key.startswith("inline"):
            feeds = {"inline": "\n\n", "inline, one line feed": "\n", "inline, none": ""}[make.key]
            turn["content"] = f"<think>\n{thought}\n</think>{feeds}{turn['content']}"
        else:
            turn[make.key] = thought
    return {"messages": turns}


def _alpaca(make: Maker, k: int) -> Row:
    row = {
        "instruction": make.question(k),
        "input": make.question(k + 5000) if k % 3 == 1 else "",
        "output": make.answer(k),
    }
    return {key: value for key, value in row.items() if value or key != "input" or k % 2}


def _squad(make: Maker, k: int) -> Row:
    answer = make.answer(k)
    context = f"{make.question(k + 5000)} {answer} {make.question(k + 7000)}"
    answers = {"text": [answer, answer], "answer_start": [context.index(answer)] * 2}
    return {
        "id": f"{k:08x}",
        "title": make.rng.choice(TOWNS),
        "context": context,
        "question": make.question(k),
        "answers": answers,
    }


def _pair(make: Maker, k: int) -> Row:
    return {"prompt": make.question(k), "chosen": f" {make.answer(k)}", "rejected": f" {make.answer(k + 3000)}"}


def _pair_chats(make: Maker, k: int) -> Row:
    question = {"role": "user", "content": make.question(k)}
    answers = [{"role": "assistant", "content": make.answer(j)} for j in (k, k + 3000)]
    return {"prompt": [question], "chosen": answers[:1], "rejected": answers[1:]}


def _prompt_chat(make: Maker, k: int) -> Row:
    turns = _exchange(make, k)
    return {"prompt": turns[:-1], "completion": turns[-1:]}


MAKERS: dict[str, Callable[[Maker, int], Row]] = {
    "chat": _chat,
    "tools": _tools,
    "reasoning": _reasoning,
    "sharegpt": lambda make, k: {"conversations": _exchange(make, k, ("human", "gpt"), "from value")},
    "prompt chat": _prompt_chat,
    "prompt": lambda make, k: {"prompt": make.question(k), "completion": f" {make.answer(k)}"},
    "alpaca": _alpaca,
    "orca": lambda make, k: {
        "id": f"niv.{k}",
        "system_prompt": make.system(k),
        "question": make.question(k),
        "response": make.answer(k),
    },
    "math": lambda make, k: {"type": "GSM_SV", "query": make.question(k), "response": make.answer(k)},
    "turns": lambda make, k: {"user": make.question(k), "assistant": make.answer(k)},
    "text": lambda make, k: {"text": f"{make.question(k)} {make.answer(k)}"},
    "summary": lambda make, k: {"document": f"{make.question(k)} {make.question(k + 5000)}", "summary": make.answer(k)},
    "squad": _squad,
    "pairs": _pair,
    "pair chats": _pair_chats,
}


@dataclass(slots=True)
class Drawn:
    """A day's rows as its file holds them, those of the evaluation file, and what was planted: findings by row."""

    rows: list[Row]
    evaluation: list[Row] = field(default_factory=list)
    planted: dict[int, set[str]] = field(default_factory=dict)
    """Any of these names is right."""

    def plant(self, place: int, *names: str) -> None:
        self.planted.setdefault(place, set()).update(names)


def drawn(kind: str, make: Maker, count: int, odd: bool) -> Drawn:
    """Rows without a fault; `odd` ones have columns that are about them, with whatever people leave in cells."""
    rows = [MAKERS[kind](make, k) for k in range(count)]
    if odd:
        rows = [row | {"note": make.rng.choice(VALUES), "votes": make.rng.choice((None, 0.5, 3.0))} for row in rows]
    return Drawn(rows, [MAKERS[kind](make, count + 100 + k) for k in range(4)])


def answer_of(row: Row) -> tuple[Row, str]:
    """The place of a row's last answer: what holds it, and under which key."""
    for name in ("messages", "conversations", "completion", "chosen"):
        if isinstance(row.get(name), list):
            last = row[name][-1]
            return last, "content" if "content" in last else "value"
    return row, next(
        name for name in ("completion", "output", "response", "assistant", "chosen", "summary", "text") if name in row
    )


def prompt_of(row: Row) -> tuple[Row, str]:
    """The place of a row's last question."""
    for name in ("messages", "conversations", "prompt"):
        if isinstance(row.get(name), list):
            ask = [turn for turn in row[name] if turn.get("role", turn.get("from")) in ("user", "human")][-1]
            return ask, "content" if "content" in ask else "value"
    return row, next(
        name for name in ("prompt", "instruction", "question", "query", "user", "document", "text") if name in row
    )


def _answered(row: Row, text: str) -> None:
    place, key = answer_of(row)
    place[key] = text


def _empty(day: Drawn, place: int, _: str, __: Maker) -> None:
    _answered(day.rows[place], " ")
    day.plant(place, "empty_answer", "dropped")


def _copied(day: Drawn, place: int, _: str, __: Maker) -> None:
    day.rows.append(copy.deepcopy(day.rows[place]))
    day.plant(len(day.rows) - 1, "duplicate")


def _contradicted(day: Drawn, place: int, _: str, make: Maker) -> None:
    day.rows.append(copy.deepcopy(day.rows[place]))
    other = "latin" if make.script == "cyrillic" else "cyrillic"  # no word in common
    _answered(day.rows[-1], f" {words(make.rng, other, 12)}")
    for one in (place, len(day.rows) - 1):
        day.plant(one, "conflicting_answers")


def _mojibake(day: Drawn, place: int, _: str, __: Maker) -> None:
    holder, key = answer_of(day.rows[place])
    holder[key] += " It is a cafÃ© in the cityâ€™s centre, naÃ¯ve as it is."
    day.plant(place, "broken_characters")


def _rendered(day: Drawn, place: int, turns: str, __: Maker) -> None:
    holder, key = answer_of(day.rows[place])
    holder[key] += f"{turns}user"
    day.plant(place, "template_twice")


def _repeats(day: Drawn, place: int, _: str, __: Maker) -> None:
    (holder, key), (asker, prompt_key) = answer_of(day.rows[place]), prompt_of(day.rows[place])
    if asker.get("input"):
        asker["input"] = ""  # else it belongs to the prompt
    holder[key] = f"{asker[prompt_key]} {holder[key]}"
    day.plant(place, "copies_prompt")


def _tags(day: Drawn, place: int, _: str, __: Maker) -> None:
    holder, key = answer_of(day.rows[place])
    holder[key] += " <p>And <b>that</b> is all.</p>"
    day.plant(place, "html")


def _asks_twice(day: Drawn, place: int, _: str, make: Maker) -> None:
    turns = day.rows[place].get("messages") or day.rows[place]["conversations"]
    ask = next(turn for turn in turns if turn.get("role", turn.get("from")) in ("user", "human"))
    turns.insert(
        turns.index(ask),
        {
            key: make.question(99) if value is not ask.get("role", ask.get("from")) else value
            for key, value in ask.items()
        },
    )
    day.plant(place, "roles", "template_error")


def _foreign(day: Drawn, place: int, _: str, __: Maker) -> None:
    turns = day.rows[place].get("messages") or day.rows[place]["conversations"]
    turns[0]["role" if "role" in turns[0] else "from"] = "wizard"
    day.plant(place, "roles", "dropped", "template_error")


def _leak(day: Drawn, place: int, _: str, make: Maker) -> None:
    leaked = copy.deepcopy(day.rows[place])
    if place % 2 and "text" not in leaked:
        _answered(leaked, f" {make.answer(8_000)} {words(make.rng, make.script, 9)}")
    day.evaluation.append(leaked)
    day.plant(place, "eval_leak")


def _same_sides(day: Drawn, place: int, _: str, __: Maker) -> None:
    day.rows[place]["rejected"] = copy.deepcopy(day.rows[place]["chosen"])
    day.plant(place, "pair_equal")


def _turned(day: Drawn, place: int, _: str, __: Maker) -> None:
    row = copy.deepcopy(day.rows[place])
    row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    day.rows.append(row)
    day.plant(place, "pair_conflict")
    day.plant(len(day.rows) - 1, "pair_conflict")


_MESSAGES = ("chat", "tools", "reasoning", "sharegpt")
_PAIRS = ("pairs", "pair chats")
_SINGLE = tuple(kind for kind in TEXTS if kind not in (*_PAIRS, "squad", "text"))
FAULTS: dict[str, tuple[tuple[str, ...], Callable[[Drawn, int, str, Maker], None]]] = {
    "empty answer": (_SINGLE, _empty),
    "copy": (TEXTS, _copied),
    "contradiction": (_SINGLE, _contradicted),
    "mojibake": (tuple(kind for kind in TEXTS if kind != "squad"), _mojibake),
    "rendered": (CHATS, _rendered),
    "prompt repeated": (_SINGLE, _repeats),
    "html": (_SINGLE, _tags),
    "two questions": (_MESSAGES, _asks_twice),
    "foreign role": (_MESSAGES, _foreign),
    "leak": (_SINGLE, _leak),
    "same sides": (_PAIRS, _same_sides),
    "turned pair": (_PAIRS, _turned),
}
"""By name: the kinds of rows that can have the fault, and what plants it."""
