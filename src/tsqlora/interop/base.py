"""Load the base model of an adapter: its modules' shapes from the config alone, or the model with weights."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from tsqlora.compat.hub import loading
from tsqlora.compat.transformers import class_for, load, require_no_adapter, without_named_files, without_weights
from tsqlora.errors import SettingsError
from tsqlora.interop.checkpoint import base_path, revision_of
from tsqlora.interop.files import read_adapter, require_inside
from tsqlora.interop.lora import LoraAdapter
from tsqlora.interop.rewrite import Shape

CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""transformers' class for each task_type of PEFT."""

_HEADS = ("score", "classifier", "out_proj", "out", "logits_proj", "linear_out", "summary")
"""Last names of a classifier's output layer."""


@dataclass(frozen=True, slots=True)
class Base:
    """Loaders for the base model; each export format calls those that it needs.

    Attributes:
        skeleton: its modules and config; weights may be absent.
        load: a fresh model, in a precision or, for None, its own.
        processors: its tokenizer, image processor, feature extractor and generation_config, those that there are.
        compare: compare logits too, for which `load` is called.
    """

    skeleton: Callable[[], PreTrainedModel]
    load: Callable[[str | None], PreTrainedModel]
    processors: Callable[[], Sequence[Any]]
    compare: bool = True


def base_of(folder: Path, path: str | None) -> Base:
    """The base at `path`, with which logits are compared, else the one that the adapter in `folder` names.

    Its functions raise SettingsError if it does not exist.
    """
    adapter = read_adapter(folder)

    def where() -> str:
        return base_path(adapter, path)

    def processors() -> Sequence[Any]:
        require_inside(folder)
        places = [(str(folder), "main")]
        with suppress(SettingsError):  # an adapter can be rewritten without its base
            places.append((where(), revision_of(where(), adapter)))
        return load_processors(*places)

    return Base(
        lambda: base_skeleton(where(), adapter),
        lambda dtype: load_base(where(), adapter, dtype),
        processors,
        compare=path is not None,
    )


def module_shapes(model: nn.Module) -> dict[str, Shape]:
    """Shapes of the modules that LoRA can adapt: linear layers, transformers' Conv1D, embeddings."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = Shape("linear", module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shapes[name] = Shape("linear", module.weight.shape[0], module.nf)
        elif isinstance(module, nn.Embedding):
            shapes[name] = Shape("embedding", module.num_embeddings, module.embedding_dim)
    return shapes


def base_skeleton(path: str, adapter: LoraAdapter) -> PreTrainedModel:
    """The base model without weights, from its config alone.  Raises SettingsError if it cannot be loaded."""
    with loading("--base", path):
        config = _config(path, adapter)
        return _skeleton(_class(config, adapter), config)


def load_base(path: str, adapter: LoraAdapter, dtype: str | None = None) -> PreTrainedModel:
    """The base model with its weights, in its own precision or the one named.  Raises as `base_skeleton`."""
    with loading("--base", path):
        config, revision = _config(path, adapter), revision_of(path, adapter)
        require_no_adapter(path, revision)
        if adapter.config.get("task_type") == "SEQ_CLS":
            _set_padding(config, path, revision)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # gives a head that the checkpoint lacks the same values every time
            how: dict[str, Any] = {"dtype": "auto" if dtype is None else getattr(torch, dtype), "revision": revision}
            if _labels(adapter):  # the head is the adapter's, whatever the checkpoint's is
                how["ignore_mismatched_sizes"] = True
            return load(_class(config, adapter), path, config=config, **how).eval()


def _config(path: str, adapter: LoraAdapter) -> Any:
    revision = revision_of(path, adapter)
    return load(AutoConfig, path, revision=revision, **_labels(adapter))


def _set_padding(config: Any, path: str, revision: str) -> None:
    """Set a missing pad token, at which a decoder reads its class: the tokenizer's, else the end token."""
    text = config.get_text_config()
    if text.pad_token_id is None:
        tokenizer: Any = load_tokenizer(path, revision)
        theirs = (None, None) if tokenizer is None else (tokenizer.pad_token_id, tokenizer.eos_token_id)
        ends = text.eos_token_id
        own = ends[0] if isinstance(ends, list) else ends
        text.pad_token_id = next((token for token in (*theirs, own) if token is not None), None)


def load_tokenizer(path: str, revision: str = "main") -> PreTrainedTokenizerBase | None:
    """The tokenizer in a directory or on the hub, or None."""
    try:
        named = without_named_files(path, revision=revision)
        tokenizer = load(AutoTokenizer, path, revision=revision, **named)
    # The last two where a class finds no vocabulary, or looks for one in a format that needs a further library.
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None
    # Without files transformers makes a tokenizer that knows only special tokens.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


def tokenizer_among(processors: Sequence[Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model's processors, or None."""
    return next((one for one in processors if isinstance(one, PreTrainedTokenizerBase)), None)


def load_processors(*places: tuple[str, str]) -> list[Any]:
    """Of each kind of processor, and of generation_config.json, the first in these places.

    They are a directory or a hub id, and a revision.
    """

    def loaded(kind: Any, path: str, revision: str) -> Any:
        with suppress(ImportError, OSError, ValueError, KeyError):  # the first without Pillow
            return load(kind, path, revision=revision)
        return None

    kinds = (AutoImageProcessor, AutoFeatureExtractor, GenerationConfig)
    loaders = (load_tokenizer, *(partial(loaded, kind) for kind in kinds))
    firsts = (next((one for place in places if (one := loader(*place)) is not None), None) for loader in loaders)
    return [one for one in firsts if one is not None]


def _class(config: Any, adapter: LoraAdapter) -> Any:
    """The task's class; without a task the class that the adapter was made on, else the checkpoint's own.

    An adapter for causal models may be one on a model that reads images as well, which has another class.
    """
    task = CLASSES.get(adapter.config.get("task_type") or "")
    kind = getattr(transformers, str((not task and _made_on(adapter)) or (config.architectures or [""])[0]), None)
    # The name may be hostile: transformers has functions and modules too.
    own = kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None
    if task is None:
        return own or transformers.AutoModel
    auto = getattr(transformers, task)
    mapped = class_for(auto, config)
    if own is None or mapped is own or not own.can_generate() or (mapped is not None and not mapped.can_generate()):
        return auto
    return auto if mapped is not None and _has_targets(auto, config, adapter) else own


def _has_targets(kind: Any, config: Any, adapter: LoraAdapter) -> bool:
    names = dict(_skeleton(kind, copy.deepcopy(config)).named_modules())
    return all(name in names for name in adapter.targets)


def _skeleton(kind: Any, config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        if not kind.__name__.startswith("Auto"):
            return kind(config)
        mapped, text = class_for(kind, config), config.get_text_config()
        # transformers 5.2 takes the text part's config only in from_pretrained.
        return without_weights(kind, text if mapped is not None and mapped.config_class is type(text) else config)


def _made_on(adapter: LoraAdapter) -> str | None:
    mapping = adapter.config.get("auto_mapping")
    return mapping.get("base_model_class") if isinstance(mapping, dict) else None


def _labels(adapter: LoraAdapter) -> Mapping[str, Any]:
    """The number of outputs of the head that came with the adapter."""
    task = adapter.config.get("task_type")
    if task not in ("SEQ_CLS", "TOKEN_CLS") and (task or "Classification" not in str(_made_on(adapter))):
        return {}
    ends = tuple(f".{head}.weight" for head in _HEADS)
    heads = [tensor for name, tensor in adapter.saved.items() if f".{name}".endswith(ends) and len(tensor.shape) == 2]
    return {"num_labels": heads[-1].shape[0]} if heads else {}
