"""That an export is what it was made from: its update, layer by layer, and a model's logits with it."""

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
"""What safetensors calls torch's dtypes."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far an export is from its source.

    Attributes:
        update: largest |ΔW − ΔW'| of any layer or head. `relative`: in units of that layer's largest |ΔW|.
        used: the largest share of what rounding may do that was used up; above 1 is an error.
        layer: where that was; None where updates were not compared.
        logits: largest difference of logits, None where no base was at hand. `logits_size`: the largest logit.
    """

    update: float
    relative: float
    used: float
    layer: str | None = ""
    logits: float | None = None
    logits_size: float | None = None

    def with_layer(self, name: str, gap: Array, bound: Array, delta: Array) -> "Difference":
        """The worse of this and another layer, in each number."""
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
    """The update of each layer, and each head, against the other's; a layer that only one has is zero in the other.

    What is allowed is what rounding the factors once to `dtype`, one of PRECISIONS, may do: 2.1 ε·|s|·|B||A|.
    Raises TsqLoraError, naming the layer, where one differs by more.
    """
    worst, precision = Difference(0.0, 0.0, 0.0), PRECISIONS[dtype]
    for name in sorted({*source.targets, *export.targets}):
        one = source.targets.get(name) or export.targets[name]
        delta, other = (a.targets[name].delta() if name in a.targets else np.zeros((1, 1)) for a in (source, export))
        bound = 2.1 * precision.eps * _products(one) + precision.least * _sums(one)
        worst = worst.with_layer(name, np.abs(delta - other), bound, delta)
    if other := source.saved.keys() ^ export.saved.keys():
        raise TsqLoraError(f"the export and its source do not both have {min(other)}; nothing was written")
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
    """|s|·|B||A|: the sizes of what is added up in ΔW."""
    a, b = target.matrices()
    return abs(target.scale) * (np.abs(b) @ np.abs(a))


def _sums(target: Target) -> Array:
    """|s|·(Σ|A| + Σ|B|) over the ranks: what ΔW moves by where every number of A and B moves by one."""
    a, b = target.matrices()
    return abs(target.scale) * (np.abs(b).sum(1, keepdims=True) + np.abs(a).sum(0, keepdims=True))


def peft_logits(model: PreTrainedModel, folder: Path) -> Tensor:
    """Logits of the model with an adapter, by PEFT; the model is used up."""
    return logits(PeftModel.from_pretrained(model, str(folder)))


def logits(model: nn.Module) -> Tensor:
    """What the model says of a few rows of random tokens, in float32; its last hidden state where it has no logits."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        said = model(**{name: value.to(device) for name, value in probe_rows(model).items()})
    if "start_logits" in said:  # question answering
        return torch.stack([said.start_logits, said.end_logits]).float().cpu()
    found = said.logits if "logits" in said else said.last_hidden_state
    return found.float().cpu()


def takes_tokens(model: PreTrainedModel) -> bool:
    """Whether `logits` can feed the model."""
    return model.main_input_name == "input_ids"


def probe_rows(model: Any) -> dict[str, Tensor]:
    """A batch of random tokens, the same for every model with this vocabulary, each row ending in its end token."""
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

    Rounding weights to `dtype` moves logits by a few of its ε, float32's own sums by more than
    its ε: 32 ε or 1e-4 of the largest are allowed.  Raises TsqLoraError beyond.
    """
    gap, size = float((reference - export).abs().max()), float(reference.abs().max())
    if not gap <= max(32 * PRECISIONS[dtype].eps, 1e-4) * size:
        raise TsqLoraError(
            f"the export's logits differ by {gap:.3g} of {size:.3g}, more than {dtype} explains; nothing was written"
        )
    return gap, size


def compare_weights(base: PreTrainedModel, merged: PreTrainedModel, adapter: LoraAdapter) -> Difference:
    """Each parameter of a merged model against base + ΔW, or against what the adapter saved of it.

    What is allowed are two ε of the model's dtype of both terms, and ΔW's own sums in float32.
    Raises TsqLoraError, naming the parameter.
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
