"""The audit's look at answers: a causal model reads a sample of the rows, and says which answers do not fit."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tsqlora.progress import Progress
from tsqlora.quality.rule import Compute
from tsqlora.text.answers import turns_of
from tsqlora.text.conversations import Conversation
from tsqlora.text.look import SAMPLE, AnswerLook, look_at_answers
from tsqlora.text.prepared import Trained
from tsqlora.text.vocabulary import Vocabulary

BATCH = 16
Sequences = Callable[[Collection[int]], Mapping[int, Sequence[Trained]]]
"""The sequences of some rows, by row."""


def answers_of(
    model: str,
    rows: Sequence[Conversation],
    sequences: Sequences,
    vocabulary: Vocabulary,
    *,
    every: bool = False,
    parts: Path | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> AnswerLook:
    """Look at a sample of the rows, or at all; without weights the look has only a note."""
    try:
        net: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    except (OSError, ValueError) as error:
        return AnswerLook(
            [], notes=[f"answers were not looked at: {model} has no weights ({str(error).splitlines()[0]})"]
        )
    readable = np.array([row.row for row in rows if row.problem is None], np.int64)
    chosen = np.sort(np.random.default_rng([seed, 45]).permutation(readable)[: None if every else SAMPLE])
    made = sequences({*chosen.tolist()})
    by_row = {row.row: row for row in rows}
    turns = [turn for row in chosen.tolist() for turn in turns_of(by_row[row], made.get(row, ()), vocabulary)]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    net = net.to(device)
    compute = Compute(BATCH, torch.bfloat16, parts=parts, progress=progress)
    return look_at_answers(net, turns, vocabulary, compute, seed=seed)
