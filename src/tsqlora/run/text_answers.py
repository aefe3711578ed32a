"""The audit's look at answers: a causal model reads a sample of the rows, and says which answers do not fit."""

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tsqlora.compat.hub import cached_model
from tsqlora.compat.transformers import load
from tsqlora.data.chat import Conversation
from tsqlora.progress import Progress
from tsqlora.quality.rule import Compute
from tsqlora.text.answers import Turn, behind, read_answers, turns_in, turns_of
from tsqlora.text.look import LEAST_TURNS, SAMPLE, AnswerLook, look_at_answers
from tsqlora.text.prepared import Trained
from tsqlora.text.vocabulary import Vocabulary

BATCH = 16
TIMED, PASSES = 8, 2.8
"""Answers that are timed, and the passes over all answers that a look takes at most, besides the planted ones."""
MARGIN = 1.3
"""Memory that a model needs, for each byte of its weights."""
Sequences = Callable[[Collection[int]], Mapping[int, Sequence[Trained]]]
"""The sequences of some rows, by row."""


def answers_of(
    model: str,
    rows: Sequence[Conversation],
    sequences: Sequences,
    vocabulary: Vocabulary,
    *,
    every: bool = False,
    trust_remote_code: bool = False,
    labels: bool = False,
    parts: Path | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda _: None,
    seed: int = 0,
) -> AnswerLook:
    """Look at a sample of the rows, or at all; a model that cannot be read here leaves only a note.

    `labels` says that these show where the answers are. `tell` gets the estimate of the time before the first batch.
    """
    if why := no_judge(model):
        return AnswerLook([], notes=[f"the model read no answers: {why}"])
    net: Any = load(AutoModelForCausalLM, model, dtype="auto", trust_remote_code=trust_remote_code)
    readable = np.array([row.row for row in rows if row.problem is None], np.int64)
    chosen = np.sort(np.random.default_rng([seed, 45]).permutation(readable)[: None if every else SAMPLE])
    made = sequences({*chosen.tolist()})
    turns = [turn for row in chosen.tolist() for turn in turns_of(rows[row], made.get(row, ()), vocabulary)]
    if labels:
        turns = turns_in((one for row in chosen.tolist() for one in made.get(row, ())), vocabulary)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    net = net.to(device)
    compute = Compute(BATCH, torch.bfloat16, parts=parts, progress=progress)
    if len(turns) >= LEAST_TURNS:
        tell(f"reads {len(turns):,} answers of {len(chosen):,} rows{about_time(net, turns, compute, vocabulary)}")
    return look_at_answers(net, turns, vocabulary, compute, seed=seed)


def no_judge(model: str) -> str:
    """Say why a model cannot read answers here; "" if it can."""
    folder = model if Path(model).is_dir() else cached_model(model, "main")
    files = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("pytorch_model*.bin")] if folder else []
    if not files:
        return f"the weights of {model} are not on this machine"
    size = MARGIN * sum(path.stat().st_size for path in files)
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else _available()
    if size > free:
        return (
            f"{model} needs {size / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free; "
            "give --model a smaller one with the same tokenizer"
        )
    return ""


def _available() -> int:
    """Bytes of memory that the machine can still give, or all that it has where it does not say."""
    try:
        return 1024 * int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0])
    except (OSError, IndexError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def about_time(model: Any, turns: Sequence[Turn], compute: Compute, vocabulary: Vocabulary) -> str:
    """Estimate the time of a look from one small batch of its answers."""
    few = [behind(turn.prompt, turn.answer) for turn in turns[:: max(1, len(turns) // TIMED)][:TIMED]]
    start = time.perf_counter()
    read_answers(model, few, vocabulary.stops, replace(compute, progress=None, parts=None), phase="timing")
    tokens = sum(len(one.before) + len(one.answer) for one in few)
    whole = PASSES * len(turns) * tokens / len(few)
    minutes = whole / tokens * (time.perf_counter() - start) / 60
    return f", for about {minutes:.0f} minutes; --no-model leaves this out" if minutes >= 1 else ""
