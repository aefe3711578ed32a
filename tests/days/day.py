"""A day of a user: a function of its number, and what makes it simpler."""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from days.families import FAMILIES, POSITIONS, tokenizer_of
from days.files import DELIMITED, FILES, holds
from days.labels import LABEL_FAULTS, LABELS, labelled
from days.prepared import MASKS
from days.rows import CHATS, FAULTS, FLAT, KEYS, TEXTS, Drawn, Maker, drawn
from days.values import EXACT, SCRIPTS

MOST_TOKENS = 4_000
"""Of all answers of a day, where each has the same length: a day lasts a few seconds."""
SEEN_IN_TOKENS = ("empty answer", "copy", "contradiction", "mojibake", "prompt repeated", "html")
"""Faults that a prepared set shows, too."""
TEXT_DOORS = ("audit", "train", "prepared", "dry run", "look", "callback", "select", "apply", "run")
LABEL_DOORS = ("audit", "train", "dry run", "apply", "run")


@dataclass(frozen=True, slots=True)
class Day:
    """What decides a day: its rows follow from these and its number."""

    number: int
    kind: str
    door: str
    family: str = "qwen 2.5"
    file: str = "jsonl"
    rows: int = 24
    lengths: str | int = 16
    script: str = "latin"
    constant: str = ""
    key: str = "inline"
    odd: bool = False
    fault: str = ""
    mask: str = ""
    """The fault of a prepared set's labels."""
    limit: int = POSITIONS
    source: bool = True
    """Whether a prepared set is audited beside its rows."""

    @property
    def of_texts(self) -> bool:
        return self.kind in TEXTS

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in asdict(self).items())


def day(number: int) -> Day:
    """Draw the day of a number."""
    rng = random.Random(number)
    of_texts = rng.random() < 0.75
    kind = rng.choice((*CHATS, *TEXTS) if of_texts else LABELS)
    door = rng.choice((*TEXT_DOORS, *TEXT_DOORS[:3]) if of_texts else LABEL_DOORS)
    families = [name for name, family in FAMILIES.items() if family.template or kind in (*FLAT, "squad")]
    lengths = rng.choice(("log-normal", "log-normal", *EXACT, "limit"))
    faults = [name for name, (kinds, _) in FAULTS.items() if kind in kinds]
    faults += LABEL_FAULTS if kind == "classes" else []
    limit = rng.choice((POSITIONS, POSITIONS, 512, 256))
    one = Day(
        number,
        kind,
        door,
        family=rng.choice(families),
        file=rng.choice([name for name in FILES if holds(name, kind)]),
        rows=rng.choice((2, 12, 24, 24, 40, 60)),
        lengths=lengths,
        script=rng.choice(("latin", "latin", *SCRIPTS)),
        constant=rng.choice(("", "", "instruction", "schema", "system")),
        key=rng.choice(KEYS),
        odd=rng.random() < 0.3,
        fault=rng.choice(faults) if faults and rng.random() < 0.4 else "",
        limit=limit,
        source=rng.random() < 0.5,
    )
    return _possible(one)


def _possible(one: Day) -> Day:
    """The day without what cannot go together."""
    if one.lengths == "limit":
        one = replace(one, limit=min(one.limit, 512), fault="", lengths=min(one.limit, 512))
    elif one.limit < POSITIONS:
        one = replace(one, limit=POSITIONS)
    if one.kind == "classes":
        one = replace(one, rows=40, lengths=16, limit=POSITIONS)
        csv = one.fault == "lone quote" and one.file not in DELIMITED[:4]
        return replace(one, file="csv") if csv else one
    if one.door not in ("audit", "prepared", "apply"):
        one = replace(one, fault="")
    if one.kind == "numbers" and one.door in ("audit", "apply"):
        one = replace(one, door="run")
    if one.door == "prepared":
        one = _of_masks(replace(one, file="sheet") if one.file == "sheets" else one)
    if one.kind in ("pairs", "pair chats") and one.door in ("train", "dry run", "callback", "run"):
        one = replace(one, door="audit")
    if isinstance(one.lengths, int):
        one = replace(one, rows=min(one.rows, max(4, MOST_TOKENS // one.lengths)))
    return replace(one, fault="") if one.rows < 12 else one


def _of_masks(one: Day) -> Day:
    """A prepared day: half of those without a fault of their rows have one of their masks."""
    if one.kind in ("pairs", "pair chats", "text") or one.limit < POSITIONS:
        return replace(one, door="audit")
    names = [name for name in MASKS if name != "two BOS" or FAMILIES[one.family].bos]
    rng = random.Random(f"{one.number} mask")
    mask = rng.choice(names) if not one.fault and rng.random() < 0.6 else ""
    seen = one.fault in SEEN_IN_TOKENS and (one.source or one.fault != "prompt repeated")  # a template hides it
    return replace(one, mask=mask, fault=one.fault if seen else "")


def rows_of(one: Day) -> Drawn:
    """The day's rows, with its fault planted in two of them."""
    rng = random.Random(f"{one.number} rows")
    if not one.of_texts:
        return labelled(one.kind, rng, one)
    count = partial(_tokens, tokenizer_of(one.family))
    make = Maker(rng, one.script, one.lengths, one.constant, count, one.key)
    made = drawn(one.kind, make, one.rows, one.odd)
    if one.fault:
        for place in rng.sample(range(2, one.rows), 2):
            FAULTS[one.fault][1](made, place, FAMILIES[one.family].turns or FAMILIES[one.family].specials[0], make)
    return made


def _tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


SIMPLER: dict[str, tuple[Any, ...]] = {
    "file": ("jsonl",),
    "odd": (False,),
    "constant": ("",),
    "script": ("latin",),
    "lengths": (16, 64),
    "rows": (4, 8, 12, 20),
    "family": ("qwen 2.5", "llama 3", "gpt-2"),
    "fault": ("",),
    "mask": ("",),
    "key": ("inline",),
    "kind": ("chat", "prompt"),
    "door": ("audit",),
}


def simpler(one: Day) -> Iterator[Day]:
    """Days that differ from it by one simpler part each."""
    for name, values in SIMPLER.items():
        for value in values:
            if getattr(one, name) == value:
                break
            if name != "rows" or value < one.rows:
                yield replace(one, **{name: value})
