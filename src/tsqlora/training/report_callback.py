"""Decisions about rows and ranks as scalars for TensorBoard, MLflow, W&B and whatever else `report_to` names."""

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsqlora.compat.transformers import callbacks_of, reporter_kinds
from tsqlora.quality.scores import Scores
from tsqlora.ranks.events import RankEvent
from tsqlora.training.quality_callback import QualityCallback
from tsqlora.training.rank_callback import RankCallback


class ReportCallback(TrainerCallback):
    """Reports what QualityCallback and RankCallback decide to the Trainer's reporters, in the step of the decision.

        trainer = Trainer(model, args, callbacks=[quality, ranks])
        trainer.add_callback(tsq.ReportCallback(trainer))

    At each adjustment reporters get `ranks/moved`, `ranks/parameters`, `ranks/least`, `ranks/most`, and of each layer
    `rank/LAYER` and `sensitivity/LAYER`; when rows are scored `quality/left_out`, `quality/effective_sample_size`
    and, for classes, `quality/wrong_labels` (the estimated share). `tsqlora train` adds this callback where
    `training.report_to` is set.
    """

    def __init__(self, trainer: Trainer) -> None:
        callbacks = callbacks_of(trainer)
        kinds = reporter_kinds(trainer.args.report_to)
        self.reporters = [callback for callback in callbacks if isinstance(callback, kinds)]
        self.ranks = next((callback for callback in callbacks if isinstance(callback, RankCallback)), None)
        self.quality = next((callback for callback in callbacks if isinstance(callback, QualityCallback)), None)
        self.adjusted, self.looks = -1, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run's earlier decisions were reported when they were made.
        self.adjusted = self.ranks.events[-1].step if self.ranks is not None and self.ranks.events else -1
        self.looks = 0 if self.quality is None or state.global_step == 0 else len(self.quality.looks)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        scalars: dict[str, float] = {}
        if self.quality is not None and len(self.quality.looks) > self.looks:
            self.looks = len(self.quality.looks)
            if self.quality.data.scores is not None:
                scalars |= of_scores(self.quality.data.scores)
        # By step, not by place: of many events the older ones are thinned out.
        for event in [] if self.ranks is None else self.ranks.events:
            if event.step > self.adjusted:
                self.adjusted = event.step
                scalars |= of_ranks(event)
        for reporter in self.reporters if scalars else ():
            # Not Trainer.log: that would end the interval over which the loss is averaged.
            reporter.on_log(args, state, control, model=kwargs["model"], logs=dict(scalars))


def of_scores(scores: Scores) -> dict[str, float]:
    """Scalars of one scoring."""
    scalars: dict[str, float] = {
        "quality/left_out": int((~scores.kept).sum()),
        "quality/effective_sample_size": scores.record.effective_sample_size,
    }
    noise = scores.record.noise
    return scalars if noise is None else scalars | {"quality/wrong_labels": noise["rate"] if noise["evident"] else 0.0}


def of_ranks(event: RankEvent) -> dict[str, float]:
    """Scalars of one adjustment."""
    ranks = event.ranks.values()
    scalars = {"moved": event.moved, "parameters": event.used, "least": min(ranks), "most": max(ranks)}
    return {
        **{f"ranks/{name}": value for name, value in scalars.items()},
        **{f"rank/{layer}": rank for layer, rank in event.ranks.items()},
        **{f"sensitivity/{layer}": value for layer, value in event.sensitivity.items()},
    }
