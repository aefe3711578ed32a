"""Load the base model of an adapter: its modules' shapes from the config alone, or the model with weights; attach."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel
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

from tsqlora.adapter.checkpoint import SUFFIXES, base_path, revision_of
from tsqlora.adapter.files import config_for, read_adapter, require_inside
from tsqlora.adapter.lora import LoraAdapter
from tsqlora.adapter.rewrite import Shape
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.libs.hub import loading
from tsqlora.libs.transformers import class_for, load, require_no_adapter, without_named_files, without_weights

CLASSES = {task: f"AutoModel{end}" for task, end in SUFFIXES.items()}
CLASSES |= {"SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "FEATURE_EXTRACTION": "AutoModel"}
"""transformers' class for each task_type of PEFT."""

_HEADS = ("score", "classifier", "out_proj", "out", "logits_proj", "linear_out", "summary")
"""Last names of a classifier's output layer."""


@dataclass(frozen=True, slots=True)
class Base:
    """The base model of an adapter, by where it lies; an export loads what it needs.

    Attributes:
        path: a directory or hub id; None for the one that the adapter names.
        compare: compare logits too, for which it is loaded.
        setting: what names the path in errors.
        revision: of the hub; None for the one that the adapter names.
        dtype: the precision if an export names none; None for its own.
        auto, config: transformers' class for its task, and its config for that, with which it gets the modules that
            were trained whole, too; None to find them by the adapter.
        processors: its tokenizer and the like; None to take them from beside the adapter, else from the base.
        trusted: the model's own code may run.
    """

    path: str | None = None
    compare: bool = True
    setting: str = "--base"
    revision: str | None = None
    dtype: str | None = None
    auto: str | None = None
    config: Any = None
    processors: Sequence[Any] | None = None
    trusted: bool = False

    def skeleton(self, adapter: LoraAdapter) -> PreTrainedModel:
        """The model without weights, from its config alone.  Raises SettingsError if it cannot be loaded."""
        path = base_path(adapter, self.path)
        with loading(self.setting, path):
            config = self._config(path, adapter)
            return _skeleton(self._class(config, adapter), config, trusted=self.trusted)

    def load(self, adapter: LoraAdapter, dtype: str | None = None) -> PreTrainedModel:
        """A fresh model with its weights, in the precision that is named, else its own.  Raises as `skeleton`."""
        path, dtype = base_path(adapter, self.path), dtype or self.dtype
        with loading(self.setting, path):
            config, revision = self._config(path, adapter), self.revision or revision_of(path, adapter)
            require_no_adapter(path, revision)
            if self.config is None and adapter.config.get("task_type") == "SEQ_CLS":
                _set_padding(config, path, revision)
            how: dict[str, Any] = {"revision": revision, "trust_remote_code": self.trusted}
            # The head is the adapter's, whatever the checkpoint's is.
            if "Classification" in (self.auto or "") or _labels(adapter):
                how["ignore_mismatched_sizes"] = True
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # gives a head that the checkpoint lacks the same values every time
                how["dtype"] = getattr(torch, dtype) if dtype else "auto"
                model = load(self._class(config, adapter), path, config=config, **how).eval()
        if self.config is not None:
            own = {name: tensor.shape for name, tensor in model.state_dict().items()}
            saved = {name: torch.tensor(t.numbers()) for name, t in adapter.saved.items() if own.get(name) == t.shape}
            model.load_state_dict(saved, strict=False)
        return model

    def processors_for(self, adapter: LoraAdapter, folder: Path) -> Sequence[Any]:
        """Of each kind of processor, and of generation_config.json, the first: the adapter's in `folder`, the base's.

        Raises DataError if a link in the folder leads out of it.
        """
        if self.processors is not None:
            return self.processors
        require_inside(folder)
        places = [(str(folder), "main")]
        with suppress(SettingsError):  # an adapter can be rewritten without its base
            path = base_path(adapter, self.path)
            places.append((path, revision_of(path, adapter)))
        kinds = (AutoTokenizer, AutoImageProcessor, AutoFeatureExtractor, GenerationConfig)
        firsts = dict[Any, Any]()
        for kind, place in product(kinds, places):
            if kind not in firsts and (one := _processor(kind, *place)) is not None:
                firsts[kind] = one
        return [*firsts.values()]

    def _config(self, path: str, adapter: LoraAdapter) -> Any:
        if self.config is not None:
            return copy.deepcopy(self.config)
        return load(AutoConfig, path, revision=self.revision or revision_of(path, adapter), **_labels(adapter))

    def _class(self, config: Any, adapter: LoraAdapter) -> Any:
        """The task's class; without a task the class that the adapter was made on, else the checkpoint's own.

        An adapter for causal models may be one on a model that reads images as well, which has another class.
        """
        if self.auto is not None:
            return getattr(transformers, self.auto)
        task = CLASSES.get(adapter.config.get("task_type") or "")
        kind = getattr(transformers, str((not task and adapter.made_on) or (config.architectures or [""])[0]), None)
        # The name may be hostile: transformers has functions and modules too.
        own = kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None
        if task is None:
            return own or transformers.AutoModel
        auto = getattr(transformers, task)
        mapped = class_for(auto, config)
        if own is None or mapped is own or not own.can_generate() or (mapped and not mapped.can_generate()):
            return auto
        names = dict(_skeleton(auto, copy.deepcopy(config)).named_modules()) if mapped else {}
        return auto if mapped and all(name in names for name in adapter.targets) else own


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


def _set_padding(config: Any, path: str, revision: str) -> None:
    """Set a missing pad token, at which a decoder reads its class: the tokenizer's, else the end token."""
    text = config.get_text_config()
    if text.pad_token_id is None:
        tokenizer = _processor(AutoTokenizer, path, revision)
        theirs = (None, None) if tokenizer is None else (tokenizer.pad_token_id, tokenizer.eos_token_id)
        ends = text.eos_token_id
        own = ends[0] if isinstance(ends, list) else ends
        text.pad_token_id = next((token for token in (*theirs, own) if token is not None), None)


def _processor(kind: Any, path: str, revision: str) -> Any:
    """The tokenizer, or another processor by its class, in a directory or on the hub; None without one."""
    try:
        named = without_named_files(path, revision=revision) if kind is AutoTokenizer else {}
        one = load(kind, path, revision=revision, **named)
    # The last two without Pillow, and where a tokenizer's class finds no vocabulary, or one that needs a library.
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None
    # Without files transformers makes a tokenizer that knows only special tokens.
    return None if kind is AutoTokenizer and len(one) <= len(one.all_special_tokens) else one


def tokenizer_among(processors: Sequence[Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model's processors, or None."""
    return next((one for one in processors if isinstance(one, PreTrainedTokenizerBase)), None)


def _skeleton(kind: Any, config: Any, *, trusted: bool = False) -> PreTrainedModel:
    with torch.device("meta"):
        if not kind.__name__.startswith("Auto"):
            return kind(config)
        mapped, text = class_for(kind, config), config.get_text_config()
        # transformers 5.2 takes the text part's config only in from_pretrained.
        part = text if mapped is not None and mapped.config_class is type(text) else config
        return without_weights(kind, part, trust_remote_code=trusted)


def _labels(adapter: LoraAdapter) -> Mapping[str, Any]:
    """The number of outputs of the head that came with the adapter."""
    task = adapter.config.get("task_type")
    if task not in ("SEQ_CLS", "TOKEN_CLS") and (task or "Classification" not in adapter.made_on):
        return {}
    ends = tuple(f".{head}.weight" for head in _HEADS)
    heads = [tensor for name, tensor in adapter.saved.items() if f".{name}".endswith(ends) and len(tensor.shape) == 2]
    return {"num_labels": heads[-1].shape[0]} if heads else {}


OPTIONS = frozenset(field.name for field in fields(LoraConfig))
_NOT_NEEDED = ("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision")


def attach(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """The model, changed in place, with the adapter in a directory, by PEFT.

    PEFT imports modules that a config names, and matches its patterns without a limit of time. So it gets the settings
    that `read_adapter` lets through, with the names of modules in place of patterns.

    Raises as `read_adapter`, DataError for what PEFT refuses, and UnsupportedError for a variant that the installed
    PEFT does not have.
    """
    adapter = read_adapter(folder)
    if lacking := [option for option in adapter.variants() if option.partition("=")[0] not in OPTIONS]:
        raise UnsupportedError(
            f"{folder} has {lacking[0]}, which PEFT {peft.__version__} does not know; install a later one"
        )
    config = {name: value for name, value in config_for(adapter).items() if name in OPTIONS - {*_NOT_NEEDED}}
    try:
        return load(PeftModel, model, model_id=str(folder), config=LoraConfig(**config), is_trainable=trainable)
    except (KeyError, ValueError) as error:  # for tensors or a part of the settings that are lacking
        raise DataError(f"PEFT cannot load {folder} ({error}); save the adapter again with save_pretrained") from None
