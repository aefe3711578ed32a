"""LoRA fine-tuning on imperfect rows: find wrong labels, learn from trusted rows, save a plain PEFT adapter.

Names are imported on first use, so that `tsqlora --help` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsqlora.adapter.slots import active_parameters, active_ranks, finalize
    from tsqlora.adapter.wrap import wrap
    from tsqlora.cli.library import audit, train
    from tsqlora.errors import DataError, SettingsError, TsqLoraError, UnsupportedError
    from tsqlora.layer_sensitivity import sensitivity
    from tsqlora.quality.epochs import sample
    from tsqlora.quality.rule import Compute, RowNames, ScoringRule
    from tsqlora.quality.score import score
    from tsqlora.quality.scores import Scores
    from tsqlora.quality.subset import QualitySubset
    from tsqlora.quality.suspects import Audit
    from tsqlora.ranks.allocate import Sensitivity, allocate
    from tsqlora.ranks.moves import RankEvent, RankSchedule
    from tsqlora.reports.write import Report, report
    from tsqlora.run.look import look
    from tsqlora.run.pool import select
    from tsqlora.text.apply import apply
    from tsqlora.training.attach import attach
    from tsqlora.training.checkpoints import last_checkpoint
    from tsqlora.training.mover import RankLoop
    from tsqlora.training.nonfinite import GuardCallback
    from tsqlora.training.quality_callback import QualityCallback
    from tsqlora.training.rank_callback import RankCallback

__all__ = [
    "Audit",
    "Compute",
    "DataError",
    "GuardCallback",
    "QualityCallback",
    "QualitySubset",
    "RankCallback",
    "RankEvent",
    "RankLoop",
    "RankSchedule",
    "Report",
    "RowNames",
    "Scores",
    "ScoringRule",
    "Sensitivity",
    "SettingsError",
    "TsqLoraError",
    "UnsupportedError",
    "active_parameters",
    "active_ranks",
    "allocate",
    "apply",
    "attach",
    "audit",
    "finalize",
    "last_checkpoint",
    "look",
    "report",
    "sample",
    "score",
    "select",
    "sensitivity",
    "train",
    "wrap",
]

_HOMES = {
    "adapter.slots": ("active_parameters", "active_ranks", "finalize"),
    "adapter.wrap": ("wrap",),
    "cli.library": ("audit", "train"),
    "errors": ("DataError", "SettingsError", "TsqLoraError", "UnsupportedError"),
    "quality.epochs": ("sample",),
    "quality.rule": ("Compute", "RowNames", "ScoringRule"),
    "quality.score": ("score",),
    "quality.scores": ("Scores",),
    "quality.subset": ("QualitySubset",),
    "quality.suspects": ("Audit",),
    "ranks.allocate": ("Sensitivity", "allocate"),
    "ranks.moves": ("RankEvent", "RankSchedule"),
    "reports.write": ("Report", "report"),
    "layer_sensitivity": ("sensitivity",),
    "run.look": ("look",),
    "run.pool": ("select",),
    "text.apply": ("apply",),
    "training.attach": ("attach",),
    "training.nonfinite": ("GuardCallback",),
    "training.checkpoints": ("last_checkpoint",),
    "training.quality_callback": ("QualityCallback",),
    "training.mover": ("RankLoop",),
    "training.rank_callback": ("RankCallback",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"tsqlora.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'tsqlora' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
