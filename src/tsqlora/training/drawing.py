"""Which epoch's rows a stock Trainer has: a callback draws them, since accelerate tells a data set its epoch only
under some samplers."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainerState

from tsqlora.errors import SettingsError
from tsqlora.quality.subset import QualitySubset

EPOCH_ERROR = 1e-6
"""The Trainer counts epochs as a float; a step is a larger part of one than this."""


def epoch_of(state: TrainerState) -> int:
    """The epoch that is under way or about to begin."""
    return int((state.epoch or 0) + EPOCH_ERROR)


def draw_epoch(data: QualitySubset | None, state: TrainerState, by: str) -> None:
    """On epoch begin: its rows, unless another callback draws them."""
    if data is not None and data.drawn_by in (None, by):
        data.begin_epoch(epoch_of(state), by)


def leave(data: QualitySubset | None, by: str) -> None:
    """On train end: from now on whoever calls `set_epoch` draws."""
    if data is not None and data.drawn_by == by:
        data.drawn_by = None


def refuse_evaluation(data: QualitySubset | None, known: Mapping[str, Any]) -> None:
    """On a prediction step: raises SettingsError where the rows that are trained on are evaluated by the same object.

    Its rows would count as handed out for training.
    """
    if data is not None and data.drawn_by is not None and known["eval_dataloader"].dataset is data:
        raise SettingsError(
            "eval_dataset is the QualitySubset that is trained on; to evaluate on training rows give a data set of its "
            "own: torch.utils.data.Subset(rows, data.draw(0))"
        )
