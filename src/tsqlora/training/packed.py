"""Whether a model keeps samples that share a row apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tsqlora.data.batches import PackedCollator
from tsqlora.errors import UnsupportedError
from tsqlora.gradients.eval_mode import eval_mode


def require_packing(model: nn.Module, collate: PackedCollator, sample: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for a model to which a sample is not the same alone and behind another in a row.

    Some take their positions from elsewhere, or look at all that stands before. The sample is put
    behind itself: its logits must be those that it has alone, but for rounding.
    """
    length = min(len(sample["input_ids"]), collate.max_length // 2)
    one = {"input_ids": list(sample["input_ids"][:length]), "labels": list(sample["labels"][:length])}
    other = {**one, "input_ids": one["input_ids"][::-1]}
    with eval_mode(model), torch.inference_mode():
        alone, behind = _logits(model, collate, [one], 0, length), _logits(model, collate, [other, one], length, length)
    rounding = max(1e-4, 16 * torch.finfo(alone.dtype).eps)
    off = float((alone - behind).abs().max() / alone.abs().max())
    if not off <= rounding:
        name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise UnsupportedError(
            f"data.packing: to {name} a sample is not the same behind another in a row (logits differ by {off:.1%}); "
            "set it to false"
        )


def _logits(
    model: nn.Module, collate: PackedCollator, samples: Sequence[Mapping[str, Any]], start: int, length: int
) -> torch.Tensor:
    device = next(model.parameters()).device
    batch = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in collate(samples).items()
    }
    batch.pop("labels")
    assert len(batch["input_ids"]) == 1, "both samples share the row"
    return model(**batch).logits[0, start : start + length]
