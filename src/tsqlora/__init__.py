"""Picks the samples worth learning from, and gives each layer the LoRA rank it needs."""

from tsqlora.adapter.slots import active_parameters, active_ranks, finalize
from tsqlora.adapter.wrap import wrap
from tsqlora.errors import DataError, NotLearnedError, SettingsError, TsqLoraError, UnsupportedError
from tsqlora.quality.score import score
from tsqlora.quality.scores import Scores, sample
from tsqlora.quality.subset import QualitySubset
from tsqlora.ranks.allocate import Sensitivity, allocate
from tsqlora.ranks.events import RankEvent
from tsqlora.sensitivity import sensitivity
from tsqlora.training.quality_callback import QualityCallback
from tsqlora.training.rank_callback import RankCallback

__all__ = [
    "DataError",
    "NotLearnedError",
    "QualityCallback",
    "QualitySubset",
    "RankCallback",
    "RankEvent",
    "Scores",
    "Sensitivity",
    "SettingsError",
    "TsqLoraError",
    "UnsupportedError",
    "active_parameters",
    "active_ranks",
    "allocate",
    "finalize",
    "sample",
    "score",
    "sensitivity",
    "wrap",
]
