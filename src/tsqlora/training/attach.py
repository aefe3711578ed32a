"""One line for an existing Trainer: its rows become a QualitySubset, with the callback and the head of a look."""

from pathlib import Path
from typing import Any

from transformers import Trainer

from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.quality.rows import Dataset
from tsqlora.quality.rule import ScoringRule
from tsqlora.quality.subset import QualitySubset
from tsqlora.training.quality_callback import QualityCallback


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
    if not isinstance(rows, Dataset):
        raise SettingsError(
            f"the Trainer's train_dataset is a {type(rows).__name__}, which has no length or no rows by number; give "
            "it rows that fit: datasets.Dataset.from_list(list(stream.take(n)))"
        )
    if getattr(trainer.args, "packing", False):
        raise UnsupportedError(
            "packing has put several samples into a row, so a row has no quality; set packing=False, or "
            "choose the rows before: dataset = tsqlora.select(model, dataset, processing_class=tokenizer)"
        )
    if trusted is not None and len(trusted) and {*rows[0]} != {*trusted[0]}:
        raise SettingsError(
            f"trusted rows have {', '.join(trusted[0])}, and those of the Trainer {', '.join(rows[0])}; prepare them "
            "alike, or choose the rows before: tsqlora.select(model, dataset, processing_class=tokenizer, trusted=rows)"
        )
    data = QualitySubset(rows, fraction, seed, trusted=trusted)
    callback = QualityCallback(data, rule=rule, look=look)
    if look is not None:
        callback.write_head(trainer.model)  # pyright: ignore[reportArgumentType]
    trainer.train_dataset = data
    trainer.add_callback(callback)
    return callback
