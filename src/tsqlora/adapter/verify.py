"""Check an export against its source: the update of every layer, and a model's logits."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tsqlora.adapter.base import attach
from tsqlora.adapter.lora import LoraAdapter, Target
from tsqlora.adapter.tensors import PRECISIONS, Array, Precision
from tsqlora.errors import TsqLoraError, first_line

_ROWS, _TOKENS = 4, 12
_ABOUT = ("water", "a democracy", "music", "the moon", "a prime number", "Python", "bread", "an island")
TEXTS = tuple(
    f"{start} {what}?"
    for start in ("What is", "Why do we need", "How would you describe", "Who first wrote about")
    for what in _ABOUT
)
"""Texts on which a model in bfloat16 is compared: on random tokens rounding is several times as large."""
_TEXT_TOKENS = 16
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""safetensors' names of torch's dtypes."""
VALUES = 1 << 22
"""Values to compare at once."""
Parts = Iterator[tuple[Array, Array, Array]]
"""|ΔW − ΔW'|, its bound, and ΔW of a layer, block by block."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far an export is from its source.

    Attributes:
        update: largest |ΔW − ΔW'| of any layer or head. `relative`: in units of that layer's largest |ΔW|.
        used: the largest difference over the rounding bound; above 1 is an error.
        layer: the layer with that difference.
    """

    update: float = 0.0
    relative: float = 0.0
    used: float = 0.0
    layer: str = ""

    def report(self) -> dict[str, float]:
        return {"update_difference": self.update, "relative_difference": self.relative}

    def with_layer(self, name: str, parts: Parts) -> "Difference":
        """The maximum of this and another layer's difference, block by block."""
        size = largest = used = 0.0
        for gap, bound, delta in parts:
            gap = np.nan_to_num(gap, nan=np.inf)
            size, largest = max(size, float(np.abs(delta).max(initial=0.0))), max(largest, float(gap.max(initial=0.0)))
            used = max(used, float((gap / np.maximum(bound, np.finfo(np.float64).tiny)).max(initial=0.0)))
        return Difference(
            max(self.update, largest),
            max(self.relative, largest / size if size else 0.0),
            max(self.used, used),
            name if used > self.used else self.layer,
        )


def compare_updates(source: LoraAdapter, export: LoraAdapter, dtype: str) -> Difference:
    """Compare the updates of all layers and the heads; a layer that only one adapter has is zero in the other.

    The bound is that of rounding the factors once to `dtype`, one of PRECISIONS: 2.1 ε·|s|·|B||A|. Raises
    TsqLoraError beyond it.
    """
    worst, precision = Difference(), PRECISIONS[dtype]
    for name in sorted({*source.targets, *export.targets}):
        worst = worst.with_layer(name, _updates(source.targets.get(name), export.targets.get(name), precision))
    if other := source.saved.keys() ^ export.saved.keys():
        raise TsqLoraError(f"only one of the export and its source has {min(other)}; nothing was written")
    for name, tensor in source.saved.items():
        worst = worst.with_layer(name, _copies(tensor.numbers(), export.saved[name].numbers(), precision))
    _require_rounding(worst, dtype)
    return worst


def _updates(source: Target | None, export: Target | None, precision: Precision) -> Parts:
    one = source or export
    assert one is not None
    assert export is None or one.outputs == export.outputs
    for rows in _blocks((one.outputs, one.inputs)):
        parts = [None if target is None else replace(target, b=target.b[rows]) for target in (source, export)]
        delta, other = (np.zeros((1, 1)) if part is None else part.delta() for part in parts)
        a, b = (np.abs(matrix) for matrix in replace(one, b=one.b[rows]).matrices())
        # Of a change of every value of A and B by one.
        sums = b.sum(1, keepdims=True) + a.sum(0, keepdims=True)
        yield np.abs(delta - other), abs(one.scale) * (2.1 * precision.eps * (b @ a) + precision.least * sums), delta


def _copies(head: Array, other: Array, precision: Precision) -> Parts:
    assert head.shape == other.shape
    for rows in _blocks(head.shape):
        own, theirs = _numbers(head[rows]), _numbers(other[rows])
        yield np.abs(own - theirs), np.abs(own) * precision.eps + precision.least, own


def _blocks(shape: tuple[int, ...]) -> Iterator[Any]:
    """Slices of the first dimension, each of at most VALUES values: a head may have a vocabulary's rows."""
    step = max(1, VALUES // max(1, math.prod(shape[1:])))
    yield from (slice(start, start + step) for start in range(0, shape[0], step)) if shape else [...]


def _require_rounding(worst: Difference, dtype: str) -> None:
    if worst.used > 1:
        raise TsqLoraError(
            f"the export's {worst.layer} differs by {worst.update:.3g}, {worst.used:.3g} times what {dtype} explains; "
            "nothing was written"
        )


def peft_logits(model: PreTrainedModel, folder: Path) -> Tensor:
    """Logits of the model with an adapter, through PEFT; the model cannot be used again."""
    return logits(attach(model, folder))


def logits(model: nn.Module, batch: Mapping[str, Tensor] | None = None) -> Tensor:
    """The model's logits, or last hidden state, for a batch, else a few rows of random tokens, in float32."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        outputs = model(**{name: value.to(device) for name, value in (batch or probe_rows(model)).items()})
    if "start_logits" in outputs:  # question answering
        return torch.stack([outputs.start_logits, outputs.end_logits]).float().cpu()
    values = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    return values.float().cpu()


def logits_of(model: nn.Module, texts: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The logits for each text, in one line."""
    return torch.cat([logits(model, text).flatten() for text in texts])


def relative_gap(low: Tensor, exact: Tensor) -> float:
    """‖low − exact‖ / ‖exact‖."""
    return float((low - exact).norm() / exact.norm())


def why_not_compared(model: PreTrainedModel) -> str | None:
    """Why `logits` cannot feed the model; None if it can."""
    if model.main_input_name != "input_ids":
        return f"the model takes {model.main_input_name}"
    try:
        logits(model)
    except Exception as error:  # a model that needs more than tokens can raise anything
        return f"{type(model).__name__} does not run on tokens alone ({first_line(error)})"
    return None


def probe_rows(model: Any) -> dict[str, Tensor]:
    """A batch of random tokens, the same for every model of this vocabulary; each row ends in the end token."""
    config = model.config
    text = config.get_text_config()
    # Among them tokens that stand for images.
    named = [item for part in (config, text) for item in part.to_dict().items()]
    special = {
        token for name, value in named if name.endswith(("token_id", "token_index")) for token in _as_list(value)
    }
    vocabulary = min(text.vocab_size, getattr(getattr(config, "encoder", text), "vocab_size", text.vocab_size))
    ordinary = torch.tensor([token for token in range(vocabulary) if token not in special])
    ids = ordinary[torch.randint(len(ordinary), (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(0))]
    if ends := [token for token in _as_list(text.eos_token_id) if token < vocabulary]:
        ids[:, -1] = ends[0]
    return _batch(ids, config)


def _batch(ids: Tensor, config: Any) -> dict[str, Tensor]:
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return rows | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


def text_batches(model: Any, tokenizer: Any) -> list[dict[str, Tensor]]:
    """TEXTS as the model reads them; the rows of `probe_rows` without a tokenizer of its vocabulary."""
    if tokenizer is None or len(tokenizer) > model.config.get_text_config().vocab_size:
        return [probe_rows(model)]
    rows = [torch.tensor([tokenizer(text)["input_ids"][:_TEXT_TOKENS]]) for text in TEXTS]
    return [_batch(row, model.config) for row in rows]


def _as_list(token: Any) -> list[int]:
    return [] if token is None else list(token) if isinstance(token, list) else [token]


def compare_logits(reference: Tensor, export: Tensor, dtype: str) -> tuple[float, float]:
    """The largest difference and the largest logit.

    Rounding weights to `dtype` moves logits by a few ε, and float32 sums by more than their ε. The bound is 32 ε or
    1e-4 of the largest logit.  Raises TsqLoraError beyond it.
    """
    gap, size = float((reference - export).abs().max()), float(reference.abs().max())
    if not gap <= max(32 * PRECISIONS[dtype].eps, 1e-4) * size:
        raise TsqLoraError(
            f"the export's logits differ by {gap:.3g} of {size:.3g}, more than {dtype} explains; nothing was written"
        )
    return gap, size


def compare_weights(base: PreTrainedModel, merged: PreTrainedModel, adapter: LoraAdapter) -> Difference:
    """Compare each parameter of a merged model with base + ΔW, or with the adapter's saved copy.

    The bound is two ε of the model's dtype for both terms, plus ΔW's own sums in float32. Raises TsqLoraError beyond
    it.
    """
    expected, worst = dict(base.named_parameters(remove_duplicate=False)), Difference()
    for name, parameter in merged.named_parameters():
        module, _, leaf = name.rpartition(".")
        target, saved = adapter.targets.get(module) if leaf == "weight" else None, adapter.saved.get(name)
        before = expected[name] if saved is None else saved.numbers()
        turned = target is not None and (target.kind == "embedding" or isinstance(merged.get_submodule(module), Conv1D))
        worst = worst.with_layer(name, _weights(before, parameter, target, turned))
    _require_rounding(worst, NAMES[merged.dtype])
    return worst


def _weights(before: Tensor | Array, merged: Tensor, target: Target | None, turned: bool) -> Parts:
    precision = PRECISIONS[NAMES[merged.dtype]]
    assert before.shape == merged.shape
    for rows in _blocks(tuple(merged.shape)):
        own, after = _numbers(before[rows]), _numbers(merged[rows])
        delta, bound = np.zeros_like(own), 2 * (precision.eps * np.abs(own) + precision.least)
        if target is not None:
            part = replace(target, a=target.a[:, rows]) if turned else replace(target, b=target.b[rows])
            a, b = (np.abs(matrix) for matrix in part.matrices())
            delta, products = ((x.T if turned else x).reshape(own.shape) for x in (part.delta(), b @ a))
            bound += max(2 * precision.eps, target.rank * PRECISIONS["F32"].eps) * abs(target.scale) * products
        yield np.abs(after - own - delta), bound, delta


def _numbers(values: Tensor | Array) -> Array:
    return values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values.astype(np.float64)
