"""A pool of rows, and trusted rows that it contradicts or not; and the rows that a training was given."""

from typing import Any

from transformers import TrainerCallback

from stock import moods

UNIQUE = [*{tuple(row["input_ids"]): row for row in moods(1000)}.values()]
ROWS, FEW = 160, 32
POOL, TRUSTED, OTHERS = UNIQUE[:ROWS], UNIQUE[ROWS : ROWS + FEW], UNIQUE[ROWS + FEW : ROWS + 2 * FEW]
UNSEEN = UNIQUE[ROWS + 2 * FEW : ROWS + 2 * FEW + 8]
NUMBERS = {tuple(row["input_ids"]): j for j, row in enumerate(UNIQUE)}
"""Of the rows by their tokens; trusted ones are numbered from ROWS on."""
CONTRARY = [row | {"labels": 1 - row["labels"]} for row in TRUSTED]
"""Trusted rows that the pool contradicts."""


class Handed(TrainerCallback):
    """The rows that each step's forward passes were given."""

    def __init__(self) -> None:
        self.steps: dict[int, list[int]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def note(module: Any, _: Any, arguments: dict[str, Any]) -> None:
            if module.training:
                pairs = zip(arguments["input_ids"].tolist(), arguments["attention_mask"].sum(1).tolist(), strict=True)
                self.steps.setdefault(state.global_step, []).extend(NUMBERS[tuple(ids[:n])] for ids, n in pairs)

        self.hook = kwargs["model"].register_forward_pre_hook(note, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook.remove()
