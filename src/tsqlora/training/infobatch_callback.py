"""InfoBatch in a stock Trainer: each epoch is drawn by the losses that rows last had in training."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora.errors import DataError, SettingsError
from tsqlora.quality.infobatch import info_batch
from tsqlora.quality.subset import Drawn, QualitySubset
from tsqlora.tasks import Task
from tsqlora.training.checkpoint import InfoBatchState
from tsqlora.training.drawing import (
    EPOCH_ERROR,
    epoch_of,
    forget_absent,
    leave,
    refuse_cut_epoch,
    refuse_evaluation,
    require_subset,
)
from tsqlora.training.manifest import announce, checkpoint_folder, seal
from tsqlora.training.row_weights import RowWeights


class InfoBatchCallback(TrainerCallback):
    """Draws a QualitySubset by `quality/infobatch.py`, with the weights that this needs.

    Losses come from training's own forward passes, so with dropout, and cost nothing. Until
    every row has been trained on once, epochs are drawn like the control's. It goes alone:
    beside QualityCallback two would draw.

    Args:
        data: the Trainer's train_dataset.
        task: needed only where training has a loss of its own (class weights, a custom one).
    """

    def __init__(self, data: QualitySubset, *, task: Task | None = None, seed: int = 0) -> None:
        require_subset(data, "InfoBatchCallback")
        self.data, self.seed = data, seed
        self.row_weights = RowWeights(data, "InfoBatchCallback", task=task)
        self.losses = self.drawn_by = np.full(len(data.dataset), np.nan)
        """Of each row, the last; and as they were when the epoch began. NaN for a row that was not seen."""

    @property
    def decided(self) -> bool:
        """Whether losses decided the last draw: every row had one when its epoch began."""
        return not np.isnan(self.drawn_by).any()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if kwargs["train_dataloader"].dataset is not self.data:
            raise SettingsError("InfoBatchCallback(data) and Trainer(train_dataset=data) need the same QualitySubset")
        if args.world_size > 1:
            raise SettingsError(
                "InfoBatchCallback knows one process's losses only; use one process, or draw by QualityCallback"
            )
        self.row_weights.begin(args, kwargs["model"])
        announce(args, state, "infobatch")
        self.losses = self.drawn_by = np.full(len(self.data.dataset), np.nan)
        if state.global_step > 0:
            self._resume(InfoBatchState.load(checkpoint_folder(args, state)))
        self.data.policy = self._chosen

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        forget_absent(self.data, state)
        if self.data.scores is not None or self.data.awaits_scores:
            raise SettingsError("InfoBatchCallback and QualityCallback would both draw the rows; leave one of them out")
        epoch = epoch_of(state)
        # A run resumed in the middle of an epoch begins it again, by the losses that it began with.
        if abs((state.epoch or 0) - epoch) < EPOCH_ERROR:
            self.drawn_by = self.losses.copy()
        self.data.begin_epoch(epoch, "InfoBatchCallback")
        self.row_weights.start(kwargs["model"], self._see)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.row_weights.end()
        refuse_cut_epoch(self.data, state, control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_evaluation(self.data, kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        InfoBatchState(torch.from_numpy(self.losses), torch.from_numpy(self.drawn_by)).save(
            checkpoint_folder(args, state)
        )
        seal(args, state, "infobatch")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.row_weights.stop()
        self.data.policy = None
        leave(self.data, "InfoBatchCallback")

    def _chosen(self, epoch: int) -> Drawn | None:
        """The epoch's draw; None until every row has a loss."""
        if not self.decided:
            return None
        rng = np.random.default_rng([self.seed, 6, epoch])
        rows, weights = info_batch(self.drawn_by, size=len(self.data), rng=rng)
        return rows, None if (weights == 1).all() else weights

    def _see(self, rows: Tensor, losses: Tensor) -> None:
        found = losses.double().cpu().numpy()
        known = np.isfinite(found)
        self.losses[rows.numpy()[known]] = found[known]

    def _resume(self, saved: InfoBatchState) -> None:
        if len(saved.losses) != len(self.losses):
            raise DataError(
                f"the run that is resumed had {len(saved.losses)} rows, and there are {len(self.losses)}; resume with "
                "the same data, or start anew"
            )
        self.losses, self.drawn_by = saved.losses.numpy().copy(), saved.drawn_by.numpy().copy()
