"""One training run in the stock Trainer, with the method's callbacks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from tsqlora.compat.transformers import set_loss_scaling, summed_batches
from tsqlora.data.batches import PackedCollator
from tsqlora.data.samples import TokenisedSplit
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.progress import Progress
from tsqlora.quality.subset import QualitySubset
from tsqlora.tasks import Answers, Task
from tsqlora.tasks.forward import Collate
from tsqlora.tasks.generation import Generation
from tsqlora.training.live import TellProgress
from tsqlora.training.nonfinite import GuardCallback
from tsqlora.training.packed import require_packing
from tsqlora.training.quality_callback import QualityCallback
from tsqlora.training.rank_callback import RankCallback
from tsqlora.training.record import RunRecord
from tsqlora.training.record_callback import RecordCallback, of_draws
from tsqlora.training.report_callback import ReportCallback


@runtime_checkable
class AddsToLoss(Protocol):
    """A callback that adds a term to each batch's loss, and needs the number of batches that a step sums."""

    def set_summed(self, summed: Callable[[], int]) -> None:
        """`summed` returns their number within a step; 1 if the gradient is that of their mean."""
        ...


@dataclass(frozen=True, slots=True)
class Method:
    """The rows that epochs are drawn from, and the callbacks that draw them and move ranks."""

    data: QualitySubset
    quality: QualityCallback | None = None
    ranks: RankCallback | None = None

    @property
    def callbacks(self) -> list[TrainerCallback]:
        return [callback for callback in (self.quality, self.ranks) if callback is not None]


@dataclass(frozen=True, slots=True)
class Inputs:
    """How batches are made and evaluated; `packed` makes them if samples share rows."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    collate: Collate
    validation: TokenisedSplit
    packed: PackedCollator | None = None


def fit(
    model: nn.Module,
    args: TrainingArguments,
    method: Method,
    inputs: Inputs,
    record: RunRecord,
    *,
    also: Sequence[TrainerCallback] = (),
    resume_from: Path | None = None,
    progress: Progress | None = None,
    run: Path | None = None,
) -> Trainer:
    """Train the model in place; decisions, costs and logs go into the record, and into run.json in `run`."""
    data, task, packed = method.data, inputs.task, inputs.packed
    guard = GuardCallback(data, ids=getattr(data.dataset, "ids", None), packed=packed is not None)
    record.quality = of_draws(data)
    parts = [part for part in (method.quality, method.ranks, guard) if part is not None]
    live: list[TrainerCallback] = [RecordCallback(record, parts, data, run)]
    if progress is not None:
        live.append(TellProgress(data, method.ranks, progress))
    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=inputs.validation,  # type: ignore[arg-type]
        processing_class=inputs.tokenizer,
        data_collator=cast(Any, inputs.collate if packed is None else packed),
        # An encoder-decoder also returns hidden states, of every evaluated row.
        preprocess_logits_for_metrics=lambda shown, _: shown[0] if isinstance(shown, tuple) else shown,
        compute_metrics=(lambda p: task.metrics(p.predictions, p.label_ids)) if isinstance(task, Answers) else None,  # type: ignore[arg-type]
        callbacks=[*method.callbacks, *also, guard, *live],
    )
    if packed is not None:
        require_packing(model, packed, data.dataset[0])  # where the Trainer has put the model
    # Both print logs to stdout, which is for a command's result only.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if args.report_to:
        trainer.add_callback(ReportCallback(trainer))
    divides = isinstance(task, Generation) and _divides_by_window(model, inputs.collate([data.dataset[0]]))
    set_loss_scaling(trainer, divides_by_window=divides)
    for callback in also:
        if isinstance(callback, AddsToLoss):
            callback.set_summed(partial(summed_batches, trainer))
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return trainer


@torch.no_grad()
def _divides_by_window(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the model's own loss is the sum over tokens, divided by the Trainer's num_items_in_batch.

    Llama's and GPT-2's is; T5's and BART's ignores the number and is the mean over the batch.
    """
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    many = torch.tensor(10**6, device=device)
    with eval_mode(model):
        mean, divided = (float(model(**inputs, **more).loss) for more in ({}, {"num_items_in_batch": many}))
    return abs(divided - mean) > 0.1 * abs(mean)
