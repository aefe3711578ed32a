"""Settings: YAML in, a frozen typed `Config` out, and back."""

from tsqlora.settings.file import (
    ENCODER,
    NO_TOKENIZER,
    config_of,
    dump_config,
    is_yaml,
    load_config,
    package_folder,
    template,
    text_config,
    writes,
)
from tsqlora.settings.settings import PRESETS, REFUSED_ARGUMENTS, Config, QualitySettings, RankSettings, Section

__all__ = [
    "ENCODER",
    "NO_TOKENIZER",
    "PRESETS",
    "REFUSED_ARGUMENTS",
    "Config",
    "QualitySettings",
    "RankSettings",
    "Section",
    "config_of",
    "dump_config",
    "is_yaml",
    "load_config",
    "package_folder",
    "template",
    "text_config",
    "writes",
]
