"""How AdaLoRA and ElaLoRA decide on ranks, as functions of steps and of the scores of triplets.  METHOD, Baselines.

A triplet is one rank of W + s·P Λ Q: a number λ with its column of P and row of Q.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tsqlora.errors import SettingsError
from tsqlora.ranks.schedule import adjustment_steps, default_interval

WARMUP, FREEZE = 0.1, 0.3
"""Shares of the run before ranks first change, and after they last do: those of our own callback."""

OFFERED = 2
"""ElaLoRA's k: triplets that each matrix offers."""

MOVES = 4
"""ElaLoRA's b₀: triplets that change places when the phase begins."""

Scores = Mapping[str, Sequence[float]]
"""The score of each triplet of each layer."""


@dataclass(frozen=True, slots=True)
class Moves:
    """Which triplets go, by layer, and how many a layer gains; layers without change are left out."""

    drops: dict[str, list[int]]
    grows: dict[str, int]


def whole_rank(mean_rank: float, method: str) -> int:
    """The mean rank as an integer; SettingsError, which names the method, if it is none.

    >>> whole_rank(4.0, "dora")
    4
    """
    if not (mean_rank >= 1 and float(mean_rank).is_integer()):
        raise SettingsError(
            f"ranks.mean is {mean_rank:g}, and {method} needs a whole rank of 1 or more; set it to a whole number, or "
            f"leave out {method}"
        )
    return int(mean_rank)


def change_phase(steps: int, *, method: str) -> range:
    """The phase of a run in which ranks may change: it begins at `start`, and at `stop` ranks are final.

    Raises SettingsError if the run is too short to have one and a step after it.

    >>> change_phase(100, method="adalora")
    range(10, 70)
    """
    phase = adjustment_steps(steps, interval=1, warmup=WARMUP, freeze=FREEZE)
    if not phase.start < phase.stop < steps:
        raise SettingsError(f"the run has {steps} optimizer steps, too few for {method}; train longer, or leave it out")
    return phase


def elalora_steps(steps: int) -> list[int]:
    """Steps at which ElaLoRA moves ranks: multiples of the interval within the phase, its first step left out.

    Raises SettingsError if there is none.

    >>> elalora_steps(60)
    [10, 20, 30, 40]
    """
    phase, every = change_phase(steps, method="elalora"), default_interval(steps)
    due = [step for step in phase[1:] if step % every == 0]
    if not due:
        raise SettingsError(
            f"the run has {steps} optimizer steps, and ElaLoRA would change no rank: it does so every {every} steps "
            f"before step {phase.stop}; train longer, or leave it out"
        )
    return due


def elalora_moves(scores: Scores, *, moves: int, offered: int = OFFERED) -> Moves:
    """ElaLoRA's rule: the lowest of the pool go, and the highest of the same pool name the layers that gain.

    Each layer offers its `offered` lowest triplets to the pool, and keeps at least one. A layer at
    rank 1 offers nothing, so it neither loses nor gains again, as in the released code. Ranks in all
    stay what they were.  Ties go to the layer, then the triplet, that stands first.

    >>> elalora_moves({"query": [0.1, 0.2, 9.0], "key": [0.5, 0.6, 0.7]}, moves=1)
    Moves(drops={'query': [0]}, grows={'key': 1})
    """
    pool: list[tuple[float, str, int]] = []
    for layer, values in scores.items():
        lowest = sorted(range(len(values)), key=values.__getitem__)
        pool += [(values[j], layer, j) for j in lowest[: min(offered, len(values) - 1)]]
    pool.sort(key=lambda triplet: triplet[0])
    drops: dict[str, list[int]] = {}
    grows: dict[str, int] = {}
    for _, layer, j in pool[:moves]:
        drops.setdefault(layer, []).append(j)
    for _, layer, _ in pool[max(0, len(pool) - moves) :]:
        grows[layer] = grows.get(layer, 0) + 1
    return Moves(drops, grows)


def first_rank(mean: int) -> int:
    """The rank that AdaLoRA begins with: half as much again as the mean, halves rounded up.

    >>> [first_rank(mean) for mean in (1, 2, 3, 4, 8)]
    [2, 3, 5, 6, 12]
    """
    return math.floor(1.5 * mean + 0.5)
