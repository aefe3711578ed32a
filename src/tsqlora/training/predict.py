"""A model's logits for every sample, in order, whatever the batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tsqlora.data.batches import sorted_batches
from tsqlora.errors import TsqLoraError
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.oom import BatchSplitter
from tsqlora.progress import Progress
from tsqlora.tasks.forward import Collate, model_logits, precision


def predict_logits(
    model: nn.Module,
    samples: Sequence[dict[str, Any]],
    collate: Collate,
    *,
    batch_size: int,
    autocast: torch.dtype | None = None,
    phase: str = "evaluation",
    progress: Progress | None = None,
) -> np.ndarray:
    """n × k logits, in the samples' order; labels, if any, are not shown to the model.

    Raises TsqLoraError where a logit is not finite: no prediction would mean anything.
    """
    device = next(model.parameters()).device
    out: np.ndarray | None = None
    done, portions = 0, BatchSplitter()

    def logits_of(indices: np.ndarray) -> np.ndarray:
        batch = collate([{k: v for k, v in samples[j].items() if k != "labels"} for j in indices])
        return model_logits(model, {name: value.to(device) for name, value in batch.items()}).cpu().numpy()

    with torch.inference_mode(), eval_mode(model), precision(device, autocast):
        for indices in sorted_batches([len(s["input_ids"]) for s in samples], batch_size):
            logits = np.concatenate(portions.of(indices, logits_of))
            out = np.empty((len(samples), logits.shape[1]), logits.dtype) if out is None else out
            out[indices] = logits
            done += len(indices)
            if progress is not None:
                progress(phase, done, len(samples))
    assert out is not None
    if broken := int((~np.isfinite(out)).any(axis=1).sum()):
        raise TsqLoraError(
            f"the model's logits are not finite for {broken} of {len(out)} rows; "
            "lower training.learning_rate or use another dtype"
        )
    return out
