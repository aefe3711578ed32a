"""Read adapter_config.json of a stranger: the settings that are used, each of a valid type and size."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tsqlora.adapter.lora import changes_base
from tsqlora.errors import DataError

_MOST_BYTES = 1 << 24
_LARGEST = 1e9
"""Bound of ranks and alphas, so that their quotients are finite."""
_MOST = 10_000
"""Bound of counts: names in a list, blocks of a model, samples and buffers of a variant."""
_MODULE = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
_INIT = re.compile(r"(pissa_niter_\d{1,2}|[a-z_]{1,20})", re.ASCII | re.IGNORECASE)
_LIBRARY = re.compile(r"(transformers|transformers_modules)(\.[\w-]+)*", re.ASCII)

Fits = Callable[[Any], bool]


def _number(value: Any, most: float = _LARGEST) -> bool:
    # No comparison with a NaN is true.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= most


def _whole(value: Any, most: float = _LARGEST) -> bool:
    return isinstance(value, int) and _number(value, most)


def _flag(value: Any) -> bool:
    return isinstance(value, bool) or value in (0, 1)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _like(pattern: re.Pattern[str]) -> Fits:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _all(fits: Fits, most: int | None = None) -> Fits:
    return lambda value: isinstance(value, list) and (most is None or len(value) <= most) and all(map(fits, value))


def _maps_to(fits: Fits) -> Fits:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


_tokens = _all(_whole)


def _counts(value: Any) -> bool:
    """Values of a variant's own settings, which may be sizes of what PEFT allocates, or turns of its loops."""
    return _number(value, _MOST) or value is None or isinstance(value, bool | str) or _all(_text, _MOST)(value)


def _blocks(value: Any) -> bool:
    pairs = _all(lambda pair: _all(_whole, 2)(pair) and len(pair) == 2, _MOST)(value)
    return pairs and sum(abs(end - start) for start, end in value) <= _MOST


_UNUSED = ("megatron_core", "megatron_config", "runtime_config", "eva_config", "corda_config", "lora_ga_config")
"""Settings of how a training starts or where it runs: not of the adapter."""

SETTINGS: Mapping[str, Fits] = {
    "peft_type": lambda value: value == "LORA",
    "r": lambda value: _whole(value) and value >= 1,
    "lora_alpha": _number,
    "use_rslora": _flag,
    # A stranger's patterns, matched by `patterns`; the targets are those that have tensors.
    "rank_pattern": _maps_to(_whole),
    "alpha_pattern": _maps_to(_number),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"), lambda _: True),
    "modules_to_save": _all(_like(_MODULE), _MOST),
    "fan_in_fan_out": _flag,
    "lora_dropout": lambda value: _number(value, 1) and value >= 0,
    "bias": lambda value: value in ("none", "all", "lora_only"),
    "init_lora_weights": lambda value: _flag(value) or _like(_INIT)(value),
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision", "peft_version"), _text),
    "auto_mapping": lambda value: isinstance(value, dict),
    "inference_mode": _flag,
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora", "ensure_weight_tying"), _flag),
    "qalora_group_size": _whole,
    "alora_invocation_tokens": _tokens,
    "trainable_token_indices": lambda value: _tokens(value) or _maps_to(_tokens)(value),
    "layer_replication": _blocks,
    "target_parameters": _all(_text, _MOST),
    "use_bdlora": lambda value: _flag(value) or _maps_to(_counts)(value),
    **dict.fromkeys(("loftq_config", "kasa_config", "monteclora_config", "velora_config"), _maps_to(_counts)),
    "arrow_config": _maps_to(lambda value: _number(value) or _counts(value)),
    **dict.fromkeys(_UNUSED, lambda _: True),
    # PEFT before 0.20 imports the module that megatron_core names, whatever it is.
    "megatron_config": lambda value: not value,
}
"""Valid values in adapter_config.json, by setting; null is valid for all but the first three."""

_REQUIRED = ("peft_type", "r", "lora_alpha")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a small JSON file.  Raises ValueError for other content, OSError if it cannot be read."""
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"it has {size:,} bytes")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(error) from None
    if not isinstance(read, dict):
        raise ValueError("it is not a JSON object")
    return read


def read_config(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The settings that are used, and the names of others that are set.  Raises DataError for invalid values."""
    try:
        read: dict[str, Any] = {"lora_alpha": 8, **read_object(path)}
    except ValueError as error:
        raise DataError(f"{path} holds no adapter settings ({error})") from None
    for setting, fits in SETTINGS.items():
        value = read.get(setting)
        if not fits(value) if setting in _REQUIRED else value is not None and not fits(value):
            raise DataError(f"{path}: {setting} is {f'{value!r}':.200}, which is invalid in PEFT's LoRA")
    config = {name: value for name, value in read.items() if name in SETTINGS and name not in _UNUSED}
    if mapping := config.get("auto_mapping"):
        # PEFT's AutoPeftModel imports the library.
        valid = {"base_model_class": re.compile(r"\w+", re.ASCII), "parent_library": _LIBRARY}
        config["auto_mapping"] = {n: mapping[n] for n, form in valid.items() if _like(form)(mapping.get(n))}
    return config, tuple(sorted(name for name, value in read.items() if name not in SETTINGS and value))


def plain_config(config: Mapping[str, Any], **changed: Any) -> dict[str, Any]:
    """A config in which only `target_modules` selects layers, and with which PEFT does not change the base."""
    return {
        **config,
        # A change of the base belongs to the adapter; what else it starts from does not.
        "init_lora_weights": config["init_lora_weights"] if changes_base(config) else True,
        "inference_mode": True,
        "use_rslora": False,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        **changed,
    }
