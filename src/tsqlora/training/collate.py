"""Samples -> the batches that a task's model is trained on, scored and asked by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from tsqlora.data.batches import MULTIPLE, GenerationCollator, collator, generation_collator
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Batch, Collate, base_model
from tsqlora.tasks.generation import Generation


@dataclass(frozen=True, slots=True)
class WithDecoderInputs:
    """Batches of a model behind an encoder: what its decoder reads is the target, one token late.

    The model makes them itself of labels, which scoring keeps for itself.
    """

    padded: GenerationCollator
    model: Any

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        batch = self.padded(samples)
        if "labels" not in batch:
            return batch
        return {**batch, "decoder_input_ids": self.model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}


def collate_of(
    task: Task, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, max_length: int, left: bool = False
) -> Collate:
    """Pads to a multiple of 8 tokens where the model has so many positions; on the left for prompts to go on from."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(task, Generation):
        return collator(tokenizer, max_length=max_length, positions=positions)
    longest = -(-max_length // MULTIPLE) * MULTIPLE
    multiple = MULTIPLE if positions is None or longest <= positions else 1
    padded = generation_collator(tokenizer, seq2seq=not task.causal, multiple=multiple, left=left)
    return padded if task.causal else WithDecoderInputs(padded, base_model(model))
