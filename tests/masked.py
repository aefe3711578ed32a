"""Sets as trainers prepare them: drawn chats, rendered by a family's template, with the labels of a mask."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tsqlora.auditing.texts.vocabulary import vocabulary_of

WORDS = (
    *("river", "stone", "market", "evening", "letter", "window", "garden", "number", "engine", "paper", "winter"),
    *("дорога", "письмо", "окно", "城市", "道路", "时间", "رسالة", "طريق", "naïve", "Straße", "e\u0301tude", "🙂"),
    *("π≈3.14", "`x = y[0]`", "$\\frac{a}{b}$", "|a|b|", "station", "bread", "music", "harbour", "copper"),
)
SPECIAL = -100


def text(rng: np.random.Generator, sigma: float = 1.0) -> str:
    """Words of several scripts; their number has a heavy tail."""
    count = 2 + int(min(300, rng.lognormal(2.0, sigma)))
    return " ".join(rng.choice(WORDS, count).tolist()) + f" {rng.integers(10**9)}."


def chats(n: int, *, seed: int = 0) -> list[list[dict[str, str]]]:
    """Chats of one or two questions and answers."""
    rng = np.random.default_rng(seed)
    roles = ("user", "assistant")
    return [
        [{"role": roles[k % 2], "content": text(rng)} for k in range(2 * int(rng.integers(1, 3)))] for _ in range(n)
    ]


def masked(tokenizer: Any, chat: Sequence[dict[str, str]], mask: str = "answers") -> dict[str, list[int]]:
    """Tokens and labels of a chat: `answers` and their stops, `everything`, the stops of `all turns` too, or `prompts`.

    A mask that ends in "without stop" leaves out the stop of the last answer.
    """
    ids = tokens(tokenizer, tokenizer.apply_chat_template(list(chat), tokenize=False))
    labels, stops = [SPECIAL] * len(ids), vocabulary_of(tokenizer).stops
    for k, message in enumerate(chat):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(list(chat[:k]), tokenize=False, add_generation_prompt=True)
            behind = tokenizer.apply_chat_template(list(chat[: k + 1]), tokenize=False).rstrip("\n")
            place = slice(len(tokens(tokenizer, before)), len(tokens(tokenizer, behind)))
            labels[place] = ids[place]
    if mask.startswith("everything"):
        labels = list(ids)
    if mask == "prompts":
        labels = [SPECIAL if label != SPECIAL else j for label, j in zip(labels, ids, strict=True)]
    if mask == "all turns":
        labels = [j if j in stops else k for j, k in zip(ids, labels, strict=True)]
    if mask.endswith("without stop"):
        ends = {*stops, *tokens(tokenizer, "\n")}
        last = max(k for k, j in enumerate(ids) if j not in ends)
        labels[last + 1 :] = [SPECIAL] * (len(ids) - last - 1)
    return {"input_ids": ids, "labels": labels}


def tokens(tokenizer: Any, rendered: str) -> list[int]:
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
