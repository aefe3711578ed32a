"""Use a trained model: metrics on labelled rows, predictions or generated texts on any file."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, TrainingArguments

from tsqlora.errors import DataError, TsqLoraError
from tsqlora.files import reading, writing
from tsqlora.model.load import positions_of
from tsqlora.model.named import read
from tsqlora.model.passes import Columns, run_pass
from tsqlora.model.request import Compute
from tsqlora.progress import Progress
from tsqlora.rows.batches import padded_labels
from tsqlora.rows.labels import require_separable
from tsqlora.rows.readers import TABLES
from tsqlora.rows.sources import open_table
from tsqlora.rows.splits import lacks_of, listed
from tsqlora.rows.table import Samples, Table, length_of
from tsqlora.rows.tokens import references
from tsqlora.rows.write import joined, require_writable, save_beside, try_rows, without_formulas, write_rows
from tsqlora.tasks import Batch, Collate, Task, require_room
from tsqlora.tasks.forward import base_model, continues, split_labels
from tsqlora.tasks.text_metrics import require_text_metrics, text_metrics
from tsqlora.training.job import Job, open_run, require_columns, require_finished

EVAL_BATCH = 64
"""Samples of an evaluation batch, unless training.per_device_eval_batch_size is set."""

Count = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
"""What a task counts on logits and targets."""


@dataclass(frozen=True, slots=True)
class Predictor:
    """What the model of a job answers: logits, metrics and texts."""

    job: Job
    compute: Compute

    @property
    def prompt_length(self) -> int:
        """Most tokens of a prompt: the positions of a causal model must also hold the text that it writes."""
        job, positions = self.job, positions_of(self.job.model)
        return job.task.reading.prompt_limit(job.max_length, job.tokenizer, positions, job.config.task.max_new_tokens)

    def logits(self, samples: Sequence[dict[str, Any]], *, phase: str) -> np.ndarray:
        """n × k logits of a task with one answer a sample."""
        job = self.job
        return predict_logits(job.model, samples, job.collate, task=job.task, phase=phase, compute=self.compute)

    def answers(self, samples: Sequence[dict[str, Any]], *, phase: str) -> tuple[np.ndarray, np.ndarray]:
        """The logits and labels of labelled samples."""
        z = self.logits(samples, phase=phase)
        return z, padded_labels([sample["labels"] for sample in samples], z.shape[1] if z.ndim == 3 else None)

    def metrics(self, samples: Sequence[dict[str, Any]], *, phase: str) -> dict[str, float]:
        """The task's metrics on labelled samples; for generation those of the rows' targets.

        Raises TsqLoraError where the summed loss is not finite.
        """
        job = self.job

        def summed(samples: Sequence[dict[str, Any]], count: Count) -> dict[str, float]:
            """The sums of what is counted on each batch, with the targets shown."""
            lengths = [len(sample["input_ids"]) for sample in samples]

            def measure(_: np.ndarray, batch: Batch) -> Columns:
                inputs, labels = split_labels(batch, job.model)
                counts = count(job.task.reading.logits(job.model, inputs), labels)
                return {name: values.numpy(force=True) for name, values in counts.items()}

            with torch.inference_mode():
                how = {"lengths": lengths, "phase": phase}
                columns = run_pass(job.model, measure, samples, job.collate, self.compute, **how)
            sums = {name: float(column.sum()) for name, column in columns.items()}
            if not math.isfinite(sums["loss"]):
                raise TsqLoraError(
                    f"the loss on {len(samples)} rows is {sums['loss']}; lower training.learning_rate or use another "
                    "dtype"
                )
            return sums

        return job.task.evaluate(samples, logits=partial(self.answers, phase=phase), summed=summed)

    def prompts(self, table: Table, *, measured: bool = False) -> Samples:
        """The prompt of each row; `measured` as in `tokenise_generation`."""
        rows, how = list(table), {"with_targets": False, "measured": measured}
        encode, most = self.job.task.reading.encode, self.prompt_length
        return encode(rows, table.format, self.job.tokenizer, max_length=most, **how)

    def texts(self, prompts: Samples, *, phase: str) -> list[str]:
        """What the model writes on each prompt, greedily or by beams, in the prompts' order; no space around it.

        Raises SettingsError where a prompt and the new tokens are more than the model has positions for.
        """
        job, task, tokenizer = self.job, self.job.config.task, self.job.tokenizer
        inner: Any = base_model(job.model)
        lengths, goes_on = [len(prompt["input_ids"]) for prompt in prompts], continues(inner)
        require_room(positions_of(inner), task.max_new_tokens, longest=max(lengths) if goes_on else 0)
        config = generation_config(inner, tokenizer, max_new_tokens=task.max_new_tokens, beams=task.beams)
        # A causal model's prompts are padded on the left: it goes on from their last token.
        collate = job.task.reading.collate(job.model, tokenizer, max_length=job.max_length, prompts=True)
        texts = [""] * len(prompts)

        def write(rows: np.ndarray, batch: Batch) -> Columns:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            written = job.model.generate(**inputs, generation_config=config)
            new = written[:, inputs["input_ids"].shape[1] :] if goes_on else written
            for j, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                texts[int(j)] = text.strip()
            return {}

        with torch.inference_mode():
            how = {"lengths": lengths, "phase": phase}
            run_pass(job.model, write, prompts, _without_labels(job.model, collate), self.compute, **how)
        return texts

    def text_metrics(self, table: Table) -> dict[str, float]:
        """Compare generated texts with the rows' targets; nothing for rows without them, such as plain text."""
        if table.format is None or table.format.name == "text":
            return {}
        require_text_metrics()
        prompts = self.prompts(table, measured=True)
        if self.prompt_length < self.job.max_length:  # reading the rows warns about cuts by max_length
            warn_of_cuts(prompts, table.name, "prompts", self.prompt_length)
        return text_metrics(self.texts(prompts, phase="writing"), references(table, table.format))


def predictor_of(job: Job, args: TrainingArguments | None = None, progress: Progress | None = None) -> Predictor:
    """Inference in training's precision, by the Trainer's arguments or by the record of a run."""
    if args is not None:
        batch_size, bf16 = args.per_device_eval_batch_size, args.bf16
    else:
        assert job.record is not None
        batch_size = job.config.training.further_arguments().get("per_device_eval_batch_size", EVAL_BATCH)
        bf16 = job.record.plan["bf16"]
    return Predictor(job, Compute(batch_size, torch.bfloat16 if bf16 else None, progress=progress))


def warn_of_cuts(split: Samples, source: str, what: str, length: int) -> None:
    """Warn if rows were cut."""
    if split.truncated:
        warnings.warn(cuts(split, f"{what} of {source}", length), stacklevel=3)


def cuts(split: Samples, what: str, length: int) -> str:
    """How many rows were cut, in words."""
    words = f"; {split.cut_words} of their words are behind the cut, without a tag" if split.cut_words else ""
    return f"{split.truncated} of {len(split)} {what} were cut to {length} tokens{words}"


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

    def unlabelled(rows: list[Any]) -> Batch:
        batch = collate([{name: value for name, value in row.items() if name != "labels"} for row in rows])
        return {name: value.to(next(model.parameters()).device) for name, value in batch.items()}

    return unlabelled


def generation_config(
    model: Any, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, beams: int = 1
) -> GenerationConfig:
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


def evaluate_run(
    run: Path, data: Path | None = None, *, overrides: Sequence[str] = (), progress: Progress | None = None
) -> dict[str, float]:
    """The task's metrics on a labelled file; without a file, on the run's test rows, else its validation rows.

    Texts are generated to measure them.
    """
    record = require_finished(run)
    writes = "format" in record.data
    if data is None and not overrides and ("test" in record.metrics or not writes):
        return record.metrics["test" if "test" in record.metrics else "validation"]
    job = open_run(run, overrides)
    if data is None:
        tables = read(job.config, labels=record.labels)
        name = "test" if "test" in tables else "validation"
        table = tables[name]
    else:
        name, table = "test", job.complete(open_table(data, split="test", hints=job.config.data.hints))
    table = job.with_files({name: table}).data[name]
    warn_of_cuts(table.samples, table.name, job.task.reading.noun(table.format), job.max_length)
    predictor = predictor_of(job, progress=progress)
    return predictor.metrics(table.samples, phase="evaluation") | predictor.text_metrics(table)


def own_rows(run: Path) -> str:
    """Name the rows that `evaluate_run` measures without a file."""
    record = require_finished(run)
    split = "test" if "test" in record.metrics else "validation"
    return f"the run's {record.plan['rows'][split]:,} {split} rows"


def predict_run(
    run: Path,
    data: Path,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Write the file's rows with a `prediction`, and a `probability` for classes; return how many rows.

    Several labels, and the tags of tokens, are a list each, in CSV and TSV joined by "|".

    They replace columns of these names, so that a file of predictions may be predicted again. Other columns of Parquet
    stay as they are in Parquet. A row without a text has an empty prediction, and a warning names it.

    Raises DataError if no row has a text, and before any prediction if `out` cannot hold the rows; TsqLoraError, which
    names a file with the predictions, if they cannot be written in the end.
    """
    require_writable(out)
    with writing(out):
        reading(data)  # a model takes a while to load
        job = open_run(run, overrides)
        table = job.using(open_table(data, split="test", hints=job.config.data.hints))
    if data.is_dir():
        say(f"{data} is a folder, and {table.name} is predicted: {len(table):,} rows")
    require_columns(table, labelled=False)
    is_table = out.suffix.lower() in TABLES
    if is_table and table.classes is not None and not table.classes.kind.single:
        require_separable(table.classes.names, cure="write .jsonl or .parquet")
    parquet = table.path is not None and {table.path.suffix.lower(), out.suffix.lower()} == {".parquet"}
    original = table.path if parquet else None
    own = [dict[str, Any]()] * len(table) if parquet else [row.cells for row in table]
    try_rows(out, own, original=original)
    complete = _with_input(table)
    predictor, length, encode = predictor_of(job, progress=progress), job.max_length, job.task.reading.encode

    def texts(table: Table) -> list[str]:
        prompts = predictor.prompts(table)
        warn_of_cuts(prompts, table.name, "prompts", predictor.prompt_length)
        return predictor.texts(prompts, phase="prediction")

    def logits(table: Table) -> tuple[np.ndarray, Samples]:
        samples = encode(list(table), table.columns, job.tokenizer, max_length=length, labels=None)
        warn_of_cuts(samples, table.name, job.task.reading.noun(table.format), length)
        return predictor.logits(samples, phase="prediction"), samples

    added = dict(zip(complete.ids.tolist(), job.task.predict(complete, logits=logits, texts=texts), strict=True))
    empty = dict.fromkeys(added[int(complete.ids[0])])
    predictions = [added.get(i, empty) for i in range(len(table))]
    shown = [_rounded(one) for one in predictions] if is_table else predictions
    predicted = [{**row, **prediction} for row, prediction in zip(own, shown, strict=True)]
    try:
        if is_table:  # spreadsheets run formulas
            predicted, cells = without_formulas(list(joined(predicted)))
            if cells:
                warnings.warn(
                    f"{cells} cells of {out} start like formulas and got a leading ' that keeps spreadsheets from "
                    "running them; .jsonl leaves them unchanged",
                    stacklevel=2,
                )
        write_rows(out, predicted, original=original)
    except Exception as error:
        numbered = [{"row": row.number, **one} for row, one in zip(table, predictions, strict=True)]
        saved = save_beside(out, numbered)
        raise TsqLoraError(f"{error}; the predictions are in {saved}, a line for each row in order") from error
    return len(table)


def _rounded(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """With probabilities of six significant digits, for readers of tables."""
    if "probability" not in prediction:
        return dict(prediction)
    p = prediction["probability"]
    short = [None if one is None else float(f"{one:.6g}") for one in (p if isinstance(p, list) else [p])]
    return {**prediction, "probability": short if isinstance(p, list) else short[0]}


def _with_input(table: Table) -> Table:
    """The rows that have an input; a warning names the others."""
    tags = table.classes is not None and table.classes.kind.by_token
    lacks = lacks_of(table.columns, table.format, answers=False, tags=tags)
    bad, complete = dict[str, list[int | str]](), list[int]()
    for row in table:
        if (reason := lacks(row)) is None:
            complete.append(row.id)
        else:
            bad.setdefault(reason, []).append(row.number)
    if not complete:
        raise DataError(f"{table.name}: no row has an input to predict: {listed(bad, table.name)}")
    if bad:
        count = f"{len(table) - len(complete):,} of {len(table):,}"
        warnings.warn(f"{table.name}: {count} predictions are empty: {listed(bad, table.name)}", stacklevel=3)
    return replace(table, ids=np.array(complete))
