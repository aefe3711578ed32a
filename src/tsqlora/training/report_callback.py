"""What quality and ranks did, told to TensorBoard, MLflow, W&B and whatever else `report_to` names."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    MLflowCallback,
    TensorBoardCallback,
    WandbCallback,
    get_reporting_integration_callbacks,
)

from tsqlora.quality.scores import Scores
from tsqlora.ranks.events import RankEvent
from tsqlora.ranks.places import layer_places
from tsqlora.training.quality_callback import QualityCallback
from tsqlora.training.rank_callback import RankCallback

CELL, GAP = 22, 2
"""Pixels of a layer in the rank map, and between two."""
SCALE = ((246, 247, 228), (147, 211, 194), (0, 114, 178), (10, 40, 90))
"""Colours of the rank map from 0 up, told apart by lightness."""
NOWHERE = (255, 255, 255)


class ReportCallback(TrainerCallback):
    """Hands the Trainer's reporters what QualityCallback and RankCallback decide, when they decide it.

        trainer = Trainer(model, args, callbacks=[quality, ranks])
        trainer.add_callback(tsq.ReportCallback(trainer))

    Scalars go to every reporter as the Trainer's own do: at each adjustment `ranks/moved`, `ranks/parameters`,
    `ranks/least`, `ranks/most`, and of each layer `rank/LAYER` and `sensitivity/LAYER`; when rows are scored
    `quality/left_out`, `quality/effective_sample_size` and, for classes, `quality/wrong_labels` (the share that is
    believed). TensorBoard, W&B and MLflow get the ranks' histogram and the rank map (kinds of module ×
    blocks) as well. `tsqlora train` does all of this where `training.report_to` is set.
    """

    def __init__(self, trainer: Trainer) -> None:
        callbacks = trainer.callback_handler.callbacks
        kinds = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
        self.reporters = [callback for callback in callbacks if isinstance(callback, kinds)]
        self.ranks = next((callback for callback in callbacks if isinstance(callback, RankCallback)), None)
        self.quality = next((callback for callback in callbacks if isinstance(callback, QualityCallback)), None)
        self.adjustments = self.scorings = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # What a resumed run did before was told then.
        self.adjustments = 0 if self.ranks is None else len(self.ranks.events)
        self.scorings = 0 if self.quality is None else self.quality.scorings

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        told: dict[str, float] = {}
        if self.quality is not None and self.quality.scorings > self.scorings:
            self.scorings = self.quality.scorings
            assert self.quality.data.scores is not None
            told |= of_scores(self.quality.data.scores)
        new = [] if self.ranks is None else self.ranks.events[self.adjustments :]
        self.adjustments += len(new)
        for event in new:
            told |= of_ranks(event)
        if not told:
            return
        for reporter in self.reporters:
            # Not Trainer.log: that would end the interval over which the loss is averaged.
            reporter.on_log(args, state, control, model=kwargs["model"], logs=dict(told))
            if new and state.is_world_process_zero:
                for kind, show in _SHOW.items():
                    if isinstance(reporter, kind):
                        show(reporter, new[-1].ranks, state.global_step)


def of_scores(scores: Scores) -> dict[str, float]:
    """What a scoring decided, as scalars."""
    told: dict[str, float] = {
        "quality/left_out": int((~scores.kept).sum()),
        "quality/effective_sample_size": scores.record["effective_sample_size"],
    }
    noise = scores.record.get("noise")
    return told if noise is None else told | {"quality/wrong_labels": noise["rate"] if noise["evident"] else 0.0}


def of_ranks(event: RankEvent) -> dict[str, float]:
    """What an adjustment decided, as scalars."""
    ranks = event.ranks.values()
    told = {"moved": event.moved, "parameters": event.used, "least": min(ranks), "most": max(ranks)}
    return {
        **{f"ranks/{name}": value for name, value in told.items()},
        **{f"rank/{layer}": rank for layer, rank in event.ranks.items()},
        **{f"sensitivity/{layer}": value for layer, value in event.sensitivity.items()},
    }


def rank_map(ranks: Mapping[str, int]) -> np.ndarray:
    """Pixels (height, width, 3): a row for each kind of module, a column for each block, the darker the higher."""
    places = {place: ranks[layer] for layer, place in layer_places(ranks).items()}
    blocks = list(dict.fromkeys(block for block, _ in places))
    kinds = list(dict.fromkeys(kind for _, kind in places))
    side = CELL + GAP
    pixels = np.full((side * len(kinds) + GAP, side * len(blocks) + GAP, 3), NOWHERE, dtype=np.uint8)
    most = max(ranks.values()) or 1
    for (block, kind), rank in places.items():
        top, left = side * kinds.index(kind) + GAP, side * blocks.index(block) + GAP
        pixels[top : top + CELL, left : left + CELL] = _colour(rank / most)
    return pixels


def _colour(share: float) -> list[int]:
    stops = np.linspace(0, 1, len(SCALE))
    return [round(float(np.interp(share, stops, channel))) for channel in zip(*SCALE, strict=True)]


# ------------------------------------------------------------------------------ histogram and map


def _tensorboard(reporter: Any, ranks: Mapping[str, int], step: int) -> None:
    if reporter.tb_writer is not None:
        reporter.tb_writer.add_histogram("train/ranks", np.array(list(ranks.values())), step)
        reporter.tb_writer.add_image("train/rank map", rank_map(ranks), step, dataformats="HWC")


def _wandb(reporter: Any, ranks: Mapping[str, int], step: int) -> None:
    import wandb  # type: ignore[import-not-found]

    pictures = {"train/ranks": wandb.Histogram(list(ranks.values())), "train/rank map": wandb.Image(rank_map(ranks))}
    wandb.log({**pictures, "train/global_step": step})


def _mlflow(reporter: Any, ranks: Mapping[str, int], step: int) -> None:
    """MLflow knows no histograms: a metric for each rank says how many layers have it."""
    import mlflow  # type: ignore[import-not-found]

    counts = Counter(ranks.values())
    mlflow.log_metrics({f"layers of rank {rank}": counts[rank] for rank in range(max(counts) + 1)}, step=step)
    mlflow.log_image(rank_map(ranks), key="rank map", step=step)


_SHOW: Mapping[type, Callable[[Any, Mapping[str, int], int], None]] = {
    TensorBoardCallback: _tensorboard,
    WandbCallback: _wandb,
    MLflowCallback: _mlflow,
}
