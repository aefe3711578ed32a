"""Settings: YAML in, a frozen typed `Config` out, and back."""

from tsqlora.run.config.file import ENCODER, dump_config, load_config, package_folder, writes
from tsqlora.run.config.removed import ELSEWHERE, REFUSED_ARGUMENTS, REMOVED_SETTINGS
from tsqlora.run.config.settings import PRESETS, Config, QualitySettings, RankSettings, Section
from tsqlora.run.config.template import template

__all__ = [
    "ELSEWHERE",
    "ENCODER",
    "PRESETS",
    "REFUSED_ARGUMENTS",
    "REMOVED_SETTINGS",
    "Config",
    "QualitySettings",
    "RankSettings",
    "Section",
    "dump_config",
    "load_config",
    "package_folder",
    "template",
    "writes",
]
