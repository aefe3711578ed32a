"""Inference with a model of any task: logits, metrics, written texts."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tsqlora.data.formats import Format
from tsqlora.data.generation import least_prompt, references, tokenise_generation
from tsqlora.data.rows import Rows
from tsqlora.data.samples import TokenisedSplit
from tsqlora.progress import Progress
from tsqlora.quality.rule import Compute
from tsqlora.tasks import Task, require_answers
from tsqlora.tasks.forward import Collate
from tsqlora.tasks.generation import Generation
from tsqlora.tasks.texts import require_text_metrics, text_metrics
from tsqlora.training.collate import collate_of
from tsqlora.training.load import positions_of
from tsqlora.training.predict import predict_logits
from tsqlora.training.write import require_room, token_metrics, write_texts

EVAL_BATCH = 64
"""Samples of an evaluation batch, unless training.per_device_eval_batch_size says otherwise."""

Samples = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Predictor:
    """Batching, precision and generation limits for inference."""

    model: nn.Module
    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    batch_size: int
    bf16: bool
    max_new_tokens: int
    beams: int

    @property
    def prompt_length(self) -> int:
        """Tokens of a prompt: a causal model's positions have room for what it writes, too."""
        positions = positions_of(self.model)
        if positions is None or not (isinstance(self.task, Generation) and self.task.causal):
            return self.max_length
        require_room(positions, self.max_new_tokens, longest=least_prompt(self.tokenizer))
        return min(self.max_length, positions - self.max_new_tokens)

    def logits(self, samples: Samples, *, phase: str, progress: Progress | None) -> np.ndarray:
        """n × k, of a task with one answer a sample."""
        return predict_logits(self.model, samples, self.collate(), phase=phase, progress=progress, **self._batching)

    def metrics(self, samples: Samples, *, phase: str, progress: Progress | None) -> dict[str, float]:
        """The task's metrics on labelled samples; of generated text those with the targets shown."""
        if isinstance(self.task, Generation):
            compute = Compute(**self._batching, progress=progress)
            return token_metrics(self.model, samples, self.collate(), self.task, phase=phase, compute=compute)
        logits = self.logits(samples, phase=phase, progress=progress)
        return require_answers(self.task, "this metric").metrics(logits, np.array([s["labels"] for s in samples]))

    def prompts(self, rows: Rows, format: Format, *, measured: bool = False) -> TokenisedSplit:
        """What the model continues, of each row; `measured` as in `tokenise_generation`."""
        assert isinstance(self.task, Generation)
        return tokenise_generation(
            rows,
            format,
            self.tokenizer,
            max_length=self.prompt_length,
            seq2seq=not self.task.causal,
            with_targets=False,
            measured=measured,
        )

    def texts(self, prompts: TokenisedSplit, *, phase: str, progress: Progress | None) -> list[str]:
        """What the model writes on each prompt."""
        assert isinstance(self.task, Generation)
        return write_texts(
            self.model,
            prompts.samples,
            self.collate(left=self.task.causal),
            self.tokenizer,
            self.task,
            max_new_tokens=self.max_new_tokens,
            beams=self.beams,
            phase=phase,
            compute=Compute(**self._batching, progress=progress),
        )

    def text_metrics(self, rows: Rows, format: Format, *, progress: Progress | None) -> dict[str, float]:
        """How near the written texts are to the rows' own; nothing of plain text, which has no target."""
        if format.name == "text":
            return {}
        require_text_metrics()
        prompts = self.prompts(rows, format, measured=True)
        if self.prompt_length < self.max_length:  # what max_length cuts is a warning where rows are read
            warn_of_cuts(prompts, rows.source, "prompts", self.prompt_length)
        written = self.texts(prompts, phase="writing", progress=progress)
        return text_metrics(written, references(rows, format))

    def collate(self, *, left: bool = False) -> Collate:
        """Batches; with `left` prompts to go on from."""
        return collate_of(self.task, self.model, self.tokenizer, max_length=self.max_length, left=left)

    @property
    def _batching(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "autocast": torch.bfloat16 if self.bf16 else None}


def warn_of_cuts(split: TokenisedSplit, source: str, what: str, kept: int) -> None:
    """Warn where rows were cut."""
    if split.truncated:
        warnings.warn(f"{split.truncated} of {len(split)} {what} of {source} were cut to {kept} tokens", stacklevel=3)
