"""One training in the stock Trainer, with the method's callbacks: of `tsqlora train`, or a Trainer that exists."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from tsqlora import distributed
from tsqlora.adapter.files import read_adapter
from tsqlora.adapter.health import require_finite
from tsqlora.auditing.draw.subset import QualitySubset
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.libs.torch import upcast
from tsqlora.libs.transformers import set_loss, set_loss_scaling
from tsqlora.model.eval_mode import eval_mode
from tsqlora.model.request import ScoringRule
from tsqlora.progress import Progress
from tsqlora.record import RunRecord
from tsqlora.rows.datasets import Dataset
from tsqlora.tasks import has_own_loss
from tsqlora.tasks.forward import base_model, generates, output_part
from tsqlora.training.job import Job, Method
from tsqlora.training.quality_callback import QualityCallback


def fit(
    job: Job,
    args: TrainingArguments,
    method: Method,
    record: RunRecord,
    *,
    also: Sequence[TrainerCallback] = (),
    resume_from: Path | None = None,
    progress: Progress | None = None,
    run: Path | None = None,
) -> Trainer:
    """Train the job's model in place; decisions, costs and logs go into the record, and into run.json in `run`."""
    model, data, task = job.model, method.data, job.task
    method.quality.into = record, run
    callbacks = [method.ranks, method.quality, *also, None if progress is None else TellProgress(progress)]

    def measure(result: Any) -> dict[str, float]:
        return task.metrics(result.predictions, result.label_ids)

    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=cast(Any, job.data["validation"].samples),
        processing_class=job.tokenizer,
        data_collator=cast(Any, job.collate),
        # An encoder-decoder also returns hidden states, of every evaluated row.
        preprocess_logits_for_metrics=lambda shown, _: shown[0] if isinstance(shown, tuple) else shown,
        compute_metrics=measure,
        callbacks=[callback for callback in callbacks if callback is not None],
    )
    # Both print logs to stdout, which is for a command's result only.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    set_loss_scaling(trainer, divides_by_window=_divides_by_window(model, job.collate([data.dataset[0]])))
    if has_own_loss(task, model):

        def loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
            logits = output_part(outputs, "logits")
            assert logits is not None
            return task.batch_loss(task.loss(upcast(logits), labels), labels)

        set_loss(trainer, loss)
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return trainer


class TellProgress(TrainerCallback):
    """Reports each step, with the last loss and the learning rate."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.loss = progress, ""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if "loss" in (logs or {}):
            self.loss = f"loss {logs['loss']:.4g}, "

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            rate = float(kwargs["lr_scheduler"].get_last_lr()[0])
            self.progress("training", state.global_step, state.max_steps, f"{self.loss}lr {rate:.3g}")


def save_adapter(trainer: Trainer, folder: Path) -> None:
    """Write what `trainer.save_model` writes, which gathers sharded weights, without its pickle; and read it again."""
    model = cast(Any, trainer.model)
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        model.save_pretrained(str(folder), is_main_process=distributed.is_first())
        return
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # in all processes, for the first one
    if distributed.is_first():
        model.save_pretrained(str(folder), state_dict=state)
        require_finite(read_adapter(folder))


@torch.no_grad()
def _divides_by_window(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the model's own loss is the sum over tokens, divided by the Trainer's num_items_in_batch.

    Llama's and GPT-2's is; T5's and BART's ignores the number and is the mean over the batch, as a classifier's.
    """
    if not generates(base_model(model)):
        return False
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    many = torch.tensor(10**6, device=device)
    with eval_mode(model):
        mean, divided = (float(model(**inputs, **more).loss) for more in ({}, {"num_items_in_batch": many}))
    return abs(divided - mean) > 0.1 * abs(mean)


def attach(
    trainer: Trainer,
    *,
    fraction: float = 0.5,
    trusted: Dataset | None = None,
    seed: int | None = None,
    rule: ScoringRule | None = None,
    look: str | Path | None = None,
) -> QualityCallback:
    """Let an existing Trainer draw its rows by quality: call it before `trainer.train()`.

    It puts a QualitySubset in place of `trainer.train_dataset`, and adds a QualityCallback; the head of a look is
    written into the model at once, before an engine shards it. Returns the callback, whose `looks` describe each look.

    Args:
        trainer: transformers' Trainer, or TRL's SFTTrainer without packing; with unsloth after
            `train_on_responses_only`.
        fraction, seed: as in QualitySubset.
        trusted: rows in the form of `trainer.train_dataset`, which the Trainer may have tokenised.
        rule, look: as in QualityCallback.

    Raises SettingsError and UnsupportedError with the line to write instead.
    """
    rows: Any = trainer.train_dataset
    if isinstance(rows, QualitySubset) or any(
        isinstance(callback, QualityCallback) for callback in trainer.callback_handler.callbacks
    ):
        raise SettingsError("the Trainer has a QualitySubset or a QualityCallback already; leave tsqlora.attach out")
    if getattr(trainer.args, "packing", False):
        raise UnsupportedError(
            "packing has put several samples into a row, so a row has no quality; set packing=False, or "
            "choose the rows before: dataset = tsqlora.select(model, dataset, processing_class=tokenizer)"
        )
    data = QualitySubset(rows, fraction, seed, trusted=trusted)
    callback = QualityCallback(data, rule=rule, look=look)
    if look is not None:
        callback.write_head(trainer.model)  # pyright: ignore[reportArgumentType]
    trainer.train_dataset = data
    trainer.add_callback(callback)
    return callback
