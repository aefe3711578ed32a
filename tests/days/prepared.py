"""Sets as trainers prepare them: token ids and labels made of the rows by the template, and the faults of masks."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from days.oracle import Expected

Sample = dict[str, list[int]]
IGNORED = -100


def sample_of(one: Expected, tokenizer: Any) -> Sample | None:
    """Token ids, with labels on the answers; None for a row that has none."""
    if one.refusal or one.targets is None:
        return None
    before = tokenizer("", add_special_tokens=True)["input_ids"] if one.plain else []
    ids, labels, place = [*before], [IGNORED] * len(before), 0
    for target in one.targets:
        start = one.text.index(target, place)
        parts = ((one.text[place:start], False), (target, True))
        for text, trained in parts:
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            ids += tokens
            labels += tokens if trained else [IGNORED] * len(tokens)
        place = start + len(target)
    rest = tokenizer(one.text[place:], add_special_tokens=False)["input_ids"] if one.text[place:] else []
    ids, labels = [*ids, *rest], [*labels, *[IGNORED] * len(rest)]
    labels[0] = IGNORED
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def _without_stop(sample: Sample, stops: set[int], bos: int | None) -> None:
    end = 1 + max(k for k, label in enumerate(sample["labels"]) if label != IGNORED)
    # Some templates write two of them, with a line feed between.
    first = next((k for k in range(max(0, end - 4), end) if sample["labels"][k] in stops), end)
    for column in sample.values():
        del column[first:]


def _bos_twice(sample: Sample, stops: set[int], bos: int | None) -> None:
    assert bos is not None
    for _ in range(1 if sample["input_ids"][0] == bos else 2):  # a template need not write one
        for name, value in (("input_ids", bos), ("labels", IGNORED), ("attention_mask", 1)):
            sample[name].insert(0, value)


def _nothing_trained(sample: Sample, stops: set[int], bos: int | None) -> None:
    sample["labels"] = [IGNORED] * len(sample["labels"])


def _inverted(sample: Sample, stops: set[int], bos: int | None) -> None:
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    sample["labels"] = [token if label == IGNORED else IGNORED for token, label in pairs]
    sample["labels"][0] = IGNORED


MASKS: dict[str, tuple[set[str], Callable[[Sample, set[int], int | None], None]]] = {
    "no stop": ({"stop_not_trained"}, _without_stop),
    "two BOS": ({"bos"}, _bos_twice),
    "nothing trained": ({"nothing_trained"}, _nothing_trained),
    "inverted mask": ({"prompt_trained", "nothing_trained", "stop_not_trained"}, _inverted),
}
"""By name: the findings that may name the fault, and what plants it."""


def spoil(samples: Sequence[Sample], name: str, tokenizer: Any, stops: Sequence[str], rng: random.Random) -> list[int]:
    """Plant a fault of masks, in two samples or in all of them, and return their places."""
    places = (
        [*range(len(samples))] if rng.random() < 0.5 else sorted(rng.sample(range(len(samples)), min(2, len(samples))))
    )
    ends = {*tokenizer.convert_tokens_to_ids(list(stops)), tokenizer.eos_token_id}
    for place in places:
        MASKS[name][1](samples[place], ends, tokenizer.bos_token_id)
    return places
