"""Settings: YAML in, a frozen typed `Config` out, and back."""

from tsqlora.config.file import dump_config, load_config, template
from tsqlora.config.settings import (
    PRESETS,
    REFUSED_ARGUMENTS,
    Config,
    PresetName,
    QualitySettings,
    RankSettings,
    Section,
    WeightSettings,
)

__all__ = [
    "PRESETS",
    "REFUSED_ARGUMENTS",
    "Config",
    "PresetName",
    "QualitySettings",
    "RankSettings",
    "Section",
    "WeightSettings",
    "dump_config",
    "load_config",
    "template",
]
