"""Settings: YAML in, a frozen typed `Config` out, and back."""

from tsqlora.run.config.file import dump_config, load_config, writes
from tsqlora.run.config.removed import ELSEWHERE, REFUSED_ARGUMENTS, REMOVED_SETTINGS
from tsqlora.run.config.settings import PRESETS, Config, QualitySettings, RankSettings, Section
from tsqlora.run.config.template import template

__all__ = [
    "ELSEWHERE",
    "PRESETS",
    "REFUSED_ARGUMENTS",
    "REMOVED_SETTINGS",
    "Config",
    "QualitySettings",
    "RankSettings",
    "Section",
    "dump_config",
    "load_config",
    "template",
    "writes",
]
