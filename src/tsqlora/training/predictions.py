"""What a model answers: logits for every sample, the loss on every target token, and texts."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from tsqlora.errors import TsqLoraError
from tsqlora.model.load import positions_of
from tsqlora.model.passes import Columns, run_pass
from tsqlora.model.request import Compute
from tsqlora.rows.table import length_of
from tsqlora.tasks import Batch, Collate, Task, require_room
from tsqlora.tasks.forward import base_model, continues, split_labels


def predict_logits(
    model: nn.Module,
    samples: Sequence[dict[str, Any]],
    collate: Collate,
    *,
    task: Task,
    compute: Compute,
    phase: str = "evaluation",
) -> np.ndarray:
    """n × k logits, n × t × k for tags, in the samples' order; labels, if any, are not shown to the model.

    Raises TsqLoraError where a logit is not finite: no prediction would mean anything.
    """
    out: np.ndarray | None = None

    def measure(rows: np.ndarray, batch: Batch) -> Columns:
        nonlocal out
        logits = task.reading.logits(model, batch).numpy(force=True)
        # The first batch has the longest samples.
        out = np.zeros((len(samples), *logits.shape[1:]), logits.dtype) if out is None else out
        out[rows, : logits.shape[1]] = logits
        return {}

    lengths = [length_of(sample) for sample in samples]
    with torch.inference_mode():
        run_pass(model, measure, samples, _without_labels(model, collate), compute, lengths=lengths, phase=phase)
    assert out is not None
    if broken := int((~np.isfinite(out)).reshape(len(out), -1).any(axis=1).sum()):
        raise TsqLoraError(
            f"the model's logits are not finite for {broken} of {len(out)} rows; "
            "lower training.learning_rate or use another dtype"
        )
    return out


def _without_labels(model: nn.Module, collate: Collate) -> Collate:
    """Collate rows without their labels, and move the batch to the model's device."""
    device = next(model.parameters()).device

    def unlabelled(rows: list[Any]) -> Batch:
        batch = collate([{name: value for name, value in row.items() if name != "labels"} for row in rows])
        return {name: value.to(device) for name, value in batch.items()}

    return unlabelled


Samples = Sequence[Mapping[str, Any]]


def summed_counts(
    model: nn.Module,
    samples: Samples,
    collate: Collate,
    task: Task,
    count: Callable[[Tensor, Tensor], Mapping[str, Tensor]],
    *,
    phase: str,
    compute: Compute,
) -> dict[str, float]:
    """Count on each batch, with the targets shown, and return the sums.

    Raises TsqLoraError where the summed `loss` is not finite.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]

    def measure(_: np.ndarray, batch: Batch) -> Columns:
        inputs, labels = split_labels(batch, model)
        counts = count(task.reading.logits(model, inputs), labels)
        return {name: values.numpy(force=True) for name, values in counts.items()}

    with torch.inference_mode():
        columns = run_pass(model, measure, samples, collate, compute, lengths=lengths, phase=phase)
    sums = {name: float(column.sum()) for name, column in columns.items()}
    if not math.isfinite(sums["loss"]):
        raise TsqLoraError(
            f"the loss on {len(samples)} rows is {sums['loss']}; lower training.learning_rate or use another dtype"
        )
    return sums


def write_texts(
    model: nn.Module,
    prompts: Samples,
    collate: Collate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    beams: int,
    phase: str,
    compute: Compute,
) -> list[str]:
    """What the model writes on each prompt, greedily or by beams, in the prompts' order; no space around it.

    Nothing of the base's generation_config counts but its special tokens: no least length, no penalty.

    `collate` must pad a causal model's prompts on the left: it goes on from their last token.
    Raises SettingsError where a prompt and the new tokens are more than the model has positions for.
    """
    inner: Any = base_model(model)
    lengths, goes_on = [len(prompt["input_ids"]) for prompt in prompts], continues(inner)
    require_room(positions_of(inner), max_new_tokens, longest=max(lengths) if goes_on else 0)
    how = writing(inner, tokenizer, max_new_tokens=max_new_tokens, beams=beams)
    texts = [""] * len(prompts)

    def write(rows: np.ndarray, batch: Batch) -> Columns:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        written = model.generate(**inputs, generation_config=how)  # type: ignore[operator]
        new = written[:, inputs["input_ids"].shape[1] :] if goes_on else written
        for j, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            texts[int(j)] = text.strip()
        return {}

    with torch.inference_mode():
        run_pass(model, write, prompts, _without_labels(model, collate), compute, lengths=lengths, phase=phase)
    return texts


def writing(model: Any, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, beams: int = 1) -> GenerationConfig:
    """Greedy search, or beams, with the model's own special tokens and nothing else of its generation_config.

    A text ends at the tokenizer's end token, with which targets were ended, and at the model's own ones.
    """
    own, last = model.generation_config, cast(Any, tokenizer.eos_token_id)
    ends = {*(own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]), last}
    start = own.decoder_start_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=beams,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=sorted(ends - {None}) or None,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None) if start is None else start,
        min_length=0,
        min_new_tokens=0,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        encoder_no_repeat_ngram_size=0,
        length_penalty=1.0,
        early_stopping=False,
        num_return_sequences=1,
    )
