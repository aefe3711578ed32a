"""Input and output of a baseline, and what several baselines need to build theirs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, TaskType
from torch import nn
from transformers import TrainerCallback, set_seed

from tsqlora.adapter.wrap import inject, new_config
from tsqlora.errors import SettingsError
from tsqlora.ranks.moves import RankSchedule
from tsqlora.training.load import Pretrained


@dataclass(frozen=True, slots=True)
class Setup:
    """Input of a baseline, in plain values.

    `steps` are the optimizer steps of the whole run.
    """

    pretrained: Pretrained
    mean_rank: float
    alpha: float
    dropout: float
    target_modules: str | list[str]
    steps: int
    seed: int


@dataclass(frozen=True, slots=True)
class Built:
    """A model that a stock Trainer trains with these callbacks.

    `trainable` counts the parameters in use and `ranks` gives each layer's rank, both at the time of the call.
    """

    model: nn.Module
    callbacks: tuple[TrainerCallback, ...]
    trainable: Callable[[], int]
    ranks: Callable[[], dict[str, int]]


def adapt(setup: Setup, *, kind: type[LoraConfig] = LoraConfig, **options: Any) -> PeftModel:
    """Add an adapter to the layers that `tsqlora.wrap` would adapt; changes the pretrained model in place.

    The head trains whole, as there. The same seed gives the same first weights.
    """
    set_seed(setup.seed)
    model = setup.pretrained.model
    config = new_config(model, setup.target_modules, setup.dropout, setup.pretrained.new_modules, kind=kind, **options)
    # PEFT's class for a task calls AdaLoRA's own forward pass, which adds the penalty; its plain class does not.
    if config.task_type is None and model.can_generate():
        config.task_type = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    return inject(model, config)


def count_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def whole_rank(mean_rank: float, method: str) -> int:
    """The mean rank as an integer; SettingsError, which names the method, if it is none.

    >>> whole_rank(4.0, "dora")
    4
    """
    if not (mean_rank >= 1 and float(mean_rank).is_integer()):
        raise SettingsError(
            f"ranks.mean is {mean_rank:g}, and {method} needs a whole rank of 1 or more; set it to a whole number, or "
            f"leave out {method}"
        )
    return int(mean_rank)


def change_phase(steps: int, *, method: str) -> range:
    """The steps of a run at which our own callback would change ranks; ranks are final from its `stop`.

    Raises SettingsError if the run is too short to have such a step and one after it.

    >>> change_phase(100, method="adalora")
    range(10, 70)
    """
    phase = RankSchedule().steps(steps, 1)
    if not phase.start < phase.stop < steps:
        raise SettingsError(f"the run has {steps} optimizer steps, too few for {method}; train longer, or leave it out")
    return phase
