"""LoRA fine-tuning on imperfect rows: find wrong labels, learn from trusted rows, save a plain PEFT adapter.

Names are imported on first use, so that `tsqlora --help` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsqlora import paper
    from tsqlora.auditing.draw.subset import QualitySubset
    from tsqlora.auditing.labels.suspects import Audit, audit_of
    from tsqlora.auditing.saved_look import apply
    from tsqlora.cli.library import audit, train
    from tsqlora.errors import DataError, SettingsError, TsqLoraError, UnsupportedError
    from tsqlora.training.checkpoints import last_checkpoint
    from tsqlora.training.fit import attach
    from tsqlora.training.look import look
    from tsqlora.training.lora import wrap
    from tsqlora.training.pool import select
    from tsqlora.training.quality_callback import QualityCallback
    from tsqlora.training.report.write import report

__all__ = [
    "Audit",
    "DataError",
    "QualityCallback",
    "QualitySubset",
    "SettingsError",
    "TsqLoraError",
    "UnsupportedError",
    "apply",
    "attach",
    "audit",
    "audit_of",
    "last_checkpoint",
    "look",
    "paper",
    "report",
    "select",
    "train",
    "wrap",
]

_HOMES = {
    "cli.library": ("audit", "train"),
    "errors": ("DataError", "SettingsError", "TsqLoraError", "UnsupportedError"),
    "auditing.draw.subset": ("QualitySubset",),
    "auditing.labels.suspects": ("Audit", "audit_of"),
    "training.report.write": ("report",),
    "training.look": ("look",),
    "training.pool": ("select",),
    "auditing.saved_look": ("apply",),
    "training.fit": ("attach",),
    "training.checkpoints": ("last_checkpoint",),
    "training.quality_callback": ("QualityCallback",),
    "training.lora": ("wrap",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"tsqlora.{home}"), name)
            globals()[name] = value
            return value
    if name == "paper":
        return importlib.import_module("tsqlora.paper")
    from tsqlora.moved import MOVED

    now = MOVED["names"].get(name)
    raise AttributeError(f"tsqlora.{name} was removed: {now}" if now else f"module 'tsqlora' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
