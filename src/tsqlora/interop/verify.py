"""Check an export against its source: the update of every layer, and a model's logits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tsqlora.errors import TsqLoraError
from tsqlora.interop.lora import LoraAdapter, Target
from tsqlora.interop.tensors import PRECISIONS, Array

_ROWS, _TOKENS = 4, 12
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""safetensors' names of torch's dtypes."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far an export is from its source.

    Attributes:
        update: largest |ΔW − ΔW'| of any layer or head. `relative`: in units of that layer's largest |ΔW|.
        used: the largest difference over the rounding bound; above 1 is an error.
        layer: the layer with that difference; None if updates were not compared.
        logits: largest difference of logits, None without a base. `logits_size`: the largest logit.
    """

    update: float
    relative: float
    used: float
    layer: str | None = ""
    logits: float | None = None
    logits_size: float | None = None

    def with_layer(self, name: str, gap: Array, bound: Array, delta: Array) -> "Difference":
        """The maximum of this and another layer's difference."""
        if not gap.size:
            return self
        gap = np.nan_to_num(gap, nan=np.inf)
        size, largest = float(np.abs(delta).max()), float(gap.max())
        used = float((gap / np.maximum(bound, np.finfo(np.float64).tiny)).max())
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
    worst, precision = Difference(0.0, 0.0, 0.0), PRECISIONS[dtype]
    for name in sorted({*source.targets, *export.targets}):
        one = source.targets.get(name) or export.targets[name]
        delta, other = (a.targets[name].delta() if name in a.targets else np.zeros((1, 1)) for a in (source, export))
        bound = 2.1 * precision.eps * _products(one) + precision.least * _sums(one)
        worst = worst.with_layer(name, np.abs(delta - other), bound, delta)
    if other := source.saved.keys() ^ export.saved.keys():
        raise TsqLoraError(f"only one of the export and its source has {min(other)}; nothing was written")
    for name, tensor in source.saved.items():
        head, theirs = (stored.numbers().astype(np.float64) for stored in (tensor, export.saved[name]))
        worst = worst.with_layer(name, np.abs(head - theirs), np.abs(head) * precision.eps + precision.least, head)
    _require_rounding(worst, dtype)
    return worst


def _require_rounding(worst: Difference, dtype: str) -> None:
    if worst.used > 1:
        raise TsqLoraError(
            f"the export's {worst.layer} differs by {worst.update:.3g}, {worst.used:.3g} times what {dtype} explains; "
            "nothing was written"
        )


def _products(target: Target) -> Array:
    """|s|·|B||A|: the sum of absolute terms of ΔW."""
    a, b = target.matrices()
    return abs(target.scale) * (np.abs(b) @ np.abs(a))


def _sums(target: Target) -> Array:
    """|s|·(Σ|A| + Σ|B|) over the ranks: the change of ΔW if every value of A and B changes by one."""
    a, b = target.matrices()
    return abs(target.scale) * (np.abs(b).sum(1, keepdims=True) + np.abs(a).sum(0, keepdims=True))


def peft_logits(model: PreTrainedModel, folder: Path) -> Tensor:
    """Logits of the model with an adapter, through PEFT; the model cannot be used again."""
    return logits(PeftModel.from_pretrained(model, str(folder)))


def logits(model: nn.Module) -> Tensor:
    """The model's logits, or last hidden state, for a few rows of random tokens, in float32."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        outputs = model(**{name: value.to(device) for name, value in probe_rows(model).items()})
    if "start_logits" in outputs:  # question answering
        return torch.stack([outputs.start_logits, outputs.end_logits]).float().cpu()
    values = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    return values.float().cpu()


def takes_tokens(model: PreTrainedModel) -> bool:
    """Whether `logits` can feed the model."""
    return model.main_input_name == "input_ids"


def probe_rows(model: Any) -> dict[str, Tensor]:
    """A batch of random tokens, the same for every model of this vocabulary; each row ends in the end token."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    special = {config.pad_token_id, *_as_list(config.eos_token_id)} - {None}
    ordinary = torch.tensor([token for token in range(config.get_text_config().vocab_size) if token not in special])
    ids = ordinary[torch.randint(len(ordinary), (_ROWS, _TOKENS), generator=generator)]
    if ends := _as_list(config.eos_token_id):
        ids[:, -1] = ends[0]
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        rows["decoder_input_ids"] = ids
    return rows


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
    expected, worst = dict(base.named_parameters(remove_duplicate=False)), Difference(0.0, 0.0, 0.0)
    for name, parameter in merged.named_parameters():
        module, _, leaf = name.rpartition(".")
        precision, after = PRECISIONS[NAMES[parameter.dtype]], _numbers(parameter)
        saved = adapter.saved.get(name)
        before = _numbers(expected[name]) if saved is None else saved.numbers().astype(np.float64)
        delta, bound = np.zeros_like(before), 2 * (precision.eps * np.abs(before) + precision.least)
        target = adapter.targets.get(module) if leaf == "weight" else None
        if target is not None:
            turned = target.kind == "embedding" or isinstance(merged.get_submodule(module), Conv1D)
            delta, products = (x.T if turned else x for x in (target.delta(), _products(target)))
            bound = bound + max(2 * precision.eps, target.rank * PRECISIONS["F32"].eps) * products
        worst = worst.with_layer(name, np.abs(after - before - delta), bound, delta)
    _require_rounding(worst, NAMES[merged.dtype])
    return worst


def _numbers(parameter: nn.Parameter) -> Array:
    return parameter.detach().cpu().double().numpy()
