"""Load an adapter into a model with PEFT, which reads its weights, but not its settings."""

from dataclasses import fields
from pathlib import Path

from peft import LoraConfig, PeftModel, __version__
from transformers import PreTrainedModel

from tsqlora.compat.transformers import load
from tsqlora.errors import UnsupportedError
from tsqlora.interop.files import config_for, read_adapter

OPTIONS = frozenset(field.name for field in fields(LoraConfig))
_NOT_NEEDED = ("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision")


def attach(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """The model, changed in place, with the adapter in a directory.

    PEFT imports modules that a config names, and matches its patterns without a limit of time. So it gets the settings
    that `read_adapter` lets through, with the names of modules in place of patterns.

    Raises as `read_adapter`, and UnsupportedError for a variant that the installed PEFT does not have.
    """
    adapter = read_adapter(folder)
    if lacking := [option for option in adapter.variants() if option.partition("=")[0] not in OPTIONS]:
        raise UnsupportedError(
            f"{folder} has {lacking[0]}, which PEFT {__version__} does not know; install a later one"
        )
    config = {name: value for name, value in config_for(adapter).items() if name in OPTIONS - {*_NOT_NEEDED}}
    return load(PeftModel, model, model_id=str(folder), config=LoraConfig(**config), is_trainable=trainable)
