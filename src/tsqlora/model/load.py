"""A pretrained model with a head for the task, its tokenizer, and the batches that it takes."""

import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.libs.bitsandbytes import keep_as_trained, linear_bits
from tsqlora.libs.hub import loading, require_model
from tsqlora.libs.transformers import (
    load,
    packing_method,
    require_no_adapter,
    set_zero3_state,
    without_weights,
)
from tsqlora.rows.labels import LabelMap
from tsqlora.tasks import Task

ROOM = 0.7
"""Share of a GPU's free memory that weights may take; a look needs the rest."""
_HEADED = re.compile("Classification|QuestionAnswering|MultipleChoice")
"""Words of classes whose head is new for the task."""


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A checkpoint's model and tokenizer, and the modules that it lacks: those are new, and must be saved.

    Of images and recordings `tokenizer` is the image processor or feature extractor.
    """

    model: nn.Module
    tokenizer: Any
    new_modules: tuple[str, ...]

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model has positions for, if its config says so."""
        return positions_of(self.model)


def positions_of(model: Any) -> int | None:
    """The longest sequence that a model has positions for, if its config says so.

    RoBERTa and similar models number positions from behind their padding index.  Of an encoder and a decoder with a
    config each, the smaller number.
    """
    configs = [getattr(model.config, part, None) for part in ("encoder", "decoder")]
    counts = [getattr(config, "max_position_embeddings", None) for config in (model.config, *configs)]
    positions = min((count for count in counts if count is not None), default=None)
    if positions is None:
        return None
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    paddings = [m.padding_idx for m in tables if isinstance(m, nn.Embedding) and m.padding_idx is not None]
    return positions - max(paddings, default=-1) - 1


def load_pretrained(
    path: str,
    task: Task,
    *,
    labels: LabelMap | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    quantization: str | None = None,
    trust_remote_code: bool = False,
    gpus: Sequence[int] = (),
) -> Pretrained:
    """The model with one output a class, or a single one for numbers (`labels` None); or one that generates text.

    A head of another size, such as that of a checkpoint trained on other classes, is replaced by a new one.
    `quantization` is "4bit" or "8bit": the body's linear layers are packed by bitsandbytes, and compute in `dtype`.
    `gpus` are the free bytes of several: layers are spread over all where the first one cannot hold the model.
    Raises SettingsError for a path that is neither a directory with a model nor a hub id, whose model has not
    what writes text, would have new layers packed, or is too large for all GPUs; and where bitsandbytes is not
    installed.
    """
    reading, common = task.reading, {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    config, tokenizer = load_settings(path, task, labels=labels, **common)
    with loading("model.path", path):
        weights, kind = getattr(torch, dtype), getattr(transformers, reading.auto)
        require_supported_packing(config)
        how: dict[str, Any] = {}
        if quantization or len(gpus) > 1:
            with set_zero3_state(), torch.device("meta"):  # ZeRO-3 would take the skeleton apart
                skeleton = without_weights(kind, config, trust_remote_code=trust_remote_code)
            how |= _packing(quantization, weights, skeleton) if quantization else {}
            how |= _spread(skeleton.num_parameters() * _BITS.get(quantization, 8 * weights.itemsize) // 8, gpus, path)
        model, info = load(
            kind,
            path,
            **common,
            config=config,
            **how,
            dtype=weights,
            ignore_mismatched_sizes=bool(reading.head(None)),
            output_loading_info=True,
        )
    reading.require_weights(info["missing_keys"], path)
    other_sizes = {key for key, *_ in info["mismatched_keys"]}
    # Masks of speech models' pretraining: training draws them, and no prediction reads them.
    missing = {key for key in info["missing_keys"] if not key.endswith(".masked_spec_embed")}
    new = new_modules(missing | other_sizes)
    for name in new:  # what trains whole
        if any(linear_bits(module) for module in model.get_submodule(name).modules()):
            raise SettingsError(
                f"model.quantization {quantization} packs {name}, which the checkpoint lacks and must be trained; "
                "leave model.quantization out"
            )
    keep_as_trained(model)
    return Pretrained(model, tokenizer, new)


def load_settings(
    path: str, task: Task, *, labels: LabelMap | None, revision: str | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    """The checkpoint's config with a head for these classes, and its tokenizer or processor.  Raises SettingsError."""
    require_model(path)
    reading, common = task.reading, {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    with loading("model.path", path):
        require_no_adapter(path, common["revision"])
        config = load(AutoConfig, path, **common, **reading.head(None if labels is None else labels.names))
        processor = reading.processor(path, config, **common)
    reading.require_base(config, path, task.name)
    return config, processor


_BITS: dict[str | None, int] = {"4bit": 4, "8bit": 8}


def _spread(size: int, gpus: Sequence[int], path: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for weights of this size: spread layers if the first GPU cannot hold them."""
    if len(gpus) < 2 or size <= ROOM * gpus[0]:
        return {}
    if size > ROOM * sum(gpus):
        raise SettingsError(
            f"model.path {path!r} has {size / 2**30:,.1f} GiB of weights, and {len(gpus)} GPUs have room for "
            f"{ROOM * sum(gpus) / 2**30:,.1f}; set model.quantization to 4bit, or name a smaller model with the same "
            "tokenizer"
        )
    return {"device_map": "auto", "max_memory": dict(enumerate(gpus))}  # without the CPU, whose hooks move weights


def _packing(quantization: str, dtype: torch.dtype, skeleton: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `from_pretrained`: pack all but heads and the output embedding."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SettingsError(
            f"model.quantization {quantization} needs the package bitsandbytes; install it with: pip install "
            "'tsqlora[quantized]'"
        )
    output = skeleton.get_output_embeddings()
    whole = [*heads(skeleton), *(name for name, module in skeleton.named_modules() if module is output)]
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    bits = {"4bit": {"load_in_4bit": True, **four}, "8bit": {"load_in_8bit": True}}[quantization]
    return {"quantization_config": BitsAndBytesConfig(**bits, llm_int8_skip_modules=whole)}


def new_modules(missing_keys: Iterable[str]) -> tuple[str, ...]:
    """The modules whose weights a checkpoint lacks: the outermost where one holds another.

    >>> new_modules({"classifier.weight", "classifier.bias", "bert.pooler.dense.weight"})
    ('bert.pooler.dense', 'classifier')
    """
    return tuple(outermost(sorted({key.rpartition(".")[0] for key in missing_keys})))


def require_supported_packing(config: Any) -> None:
    """Refuse a model whose config says that GPTQ packed its weights."""
    if packing_method(config) == "gptq":
        raise UnsupportedError(
            "the base model is packed by GPTQ, which supports neither ranks nor scores; take the model that it was "
            "made from, with model.quantization 4bit (bitsandbytes)"
        )


def outermost(names: Iterable[str]) -> list[str]:
    """The modules that are not inside another one of these, each once.

    >>> outermost(["classifier.dense", "classifier", "bert.pooler.dense"])
    ['classifier', 'bert.pooler.dense']
    """
    once = list(dict.fromkeys(names))
    return [name for name in once if not any(name.startswith(f"{other}.") for other in once)]


def heads(model: nn.Module) -> list[str]:
    """The modules of a classifier beside its body: what a pretrained checkpoint lacks."""
    if not (isinstance(model, PreTrainedModel) and _HEADED.search(type(model).__name__)):
        return []
    parts = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    if model.base_model_prefix in parts:
        return [name for name in parts if name != model.base_model_prefix]
    return parts[-1:]  # the body has another name than its family's, or several; the head comes last
