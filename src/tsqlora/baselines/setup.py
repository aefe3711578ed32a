"""Input and output of a baseline: Setup and Built."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftModel, TaskType
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState, set_seed

from tsqlora.adapter.wrap import inject, new_config
from tsqlora.errors import TsqLoraError, UnsupportedError
from tsqlora.quality.cost import PhaseCost
from tsqlora.tasks.forward import Collate
from tsqlora.training.load import Pretrained


@dataclass(frozen=True, slots=True)
class Setup:
    """Input of a baseline, in plain values.

    `steps` are the optimizer steps of the whole run. `samples` are tokenised rows of the training
    data, `collate` and `batch_size` those of training: EVA passes them through the model.
    """

    pretrained: Pretrained
    mean_rank: float
    max_rank: int
    alpha: float
    dropout: float
    target_modules: str | list[str]
    steps: int
    samples: Sequence[Mapping[str, Any]]
    collate: Collate
    batch_size: int
    seed: int


@dataclass(frozen=True, slots=True)
class Built:
    """A model that a stock Trainer trains with these callbacks.

    `trainable` counts, at the end of training, the parameters that are in use; `ranks` tells
    each layer's rank as it is now, and nothing where there are none. `cost` are the passes that building took.
    """

    model: nn.Module
    callbacks: tuple[TrainerCallback, ...]
    trainable: Callable[[], int]
    ranks: Callable[[], dict[str, int]]
    cost: PhaseCost = field(default_factory=PhaseCost)


def adapt(setup: Setup, *, kind: type[LoraConfig] = LoraConfig, **options: Any) -> PeftModel:
    """The pretrained model with an adapter in the layers that `tsqlora.wrap` would adapt, changed in place.

    The head trains whole, as there. The same seed gives the same first weights.
    """
    set_seed(setup.seed)
    pretrained = setup.pretrained
    config = new_config(
        pretrained.model, setup.target_modules, setup.dropout, pretrained.new_modules, kind=kind, **options
    )
    # PEFT's class for a task calls AdaLoRA's own forward pass, which adds the penalty; its plain class does not.
    config.task_type = config.task_type or _writing(pretrained.model)
    return inject(pretrained.model, config)


def _writing(model: PreTrainedModel) -> TaskType | None:
    """PEFT's task of a model that generates text."""
    if not model.can_generate():
        return None
    return TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM


def count_trainable(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def require_whole_run(state: TrainerState, steps: int, method: str) -> None:
    """Raises unless the run begins now and has the steps that the method was built for."""
    if state.global_step > 0:
        raise UnsupportedError(
            f"{method} keeps no state in checkpoints, so it cannot resume at step {state.global_step}; start again"
        )
    if state.max_steps != steps:
        raise TsqLoraError(
            f"{method} was built for a run of {steps} optimizer steps, and this one has {state.max_steps}; give Setup "
            "the run's own number"
        )
