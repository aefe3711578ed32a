"""The trusted model θ_R: the run's model, trained on trusted rows alone.  METHOD 1.2.

After RHO-loss (Mindermann et al. 2022) and CoLoR-Filter (Brandfonbrener et al. 2024).
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import nn

from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.quality.rows import Dataset
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Batch, Collate, model_logits, precision, split_labels
from tsqlora.tasks.generation import Generation

BATCH_SIZE = 16
STEPS = 100
STEPS_OF_TEXT = 24
RATE = 2.0
"""Times the run's learning rate."""


@dataclass(frozen=True, slots=True, eq=False)
class Trusted:
    """Rows that look like what the model shall be good at, and how a model is trained on them alone."""

    rows: Dataset
    learning_rate: float = 5e-4
    """Of the run; the trusted model has twice as much."""
    batch_size: int = BATCH_SIZE
    """Of the run; the trusted model has it where the answer is text, else 16."""
    twins: Bool[np.ndarray, " n"] | None = None
    """Rows of the data set that have the input of one of these; they are not drawn."""
    loss: Float[np.ndarray, " n"] | None = None
    """The trusted model's losses on the data set, where an earlier look measured them."""

    def __post_init__(self) -> None:
        if len(self.rows) < 2:
            raise SettingsError(f"there is {len(self.rows)} trusted row; give at least 2, better 32 to 200")


def trusted_steps_of(task: Task, rows: int, batch_size: int) -> tuple[int, int]:
    """Steps of the trusted model, and rows of each: of text a few of the run's batches."""
    text = isinstance(task, Generation)
    return STEPS_OF_TEXT if text else STEPS, min(rows, batch_size if text else BATCH_SIZE)


@contextmanager
def trusted_model(
    model: nn.Module,
    rows: Dataset,
    collate: Collate,
    *,
    task: Task,
    learning_rate: float,
    steps: int,
    batch_size: int = BATCH_SIZE,
    autocast: torch.dtype | None = None,
    rng: np.random.Generator,
    start: Callable[[], None] = lambda: None,
) -> Generator[None]:
    """While open, the model is trained on these rows alone; afterwards it is as it was, bit for bit.

    AdamW without weight decay, without dropout, at a constant rate; a fresh order in each pass over the rows. `start`
    is called first, and may change trainable weights, such as a head's. Weights, gradients, modes and the state of the
    random generators are restored, also after an error. Raises TsqLoraError where a loss is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [(p, p.detach().clone(), p.grad) for p in parameters]
    with eval_mode(model):
        try:
            start()
            _train(model, _batches(rows, collate, batch_size, steps, rng), task, parameters, learning_rate, autocast)
            yield
        finally:
            with torch.no_grad():
                for parameter, value, gradient in before:
                    parameter.copy_(value)
                    parameter.grad = gradient


def _train(
    model: nn.Module,
    batches: Callable[[], Generator[Batch]],
    task: Task,
    parameters: Sequence[nn.Parameter],
    learning_rate: float,
    autocast: torch.dtype | None,
) -> None:
    for parameter in parameters:
        parameter.grad = None
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    device = parameters[0].device
    with torch.enable_grad():
        for batch in batches():
            inputs, labels = split_labels(batch, model)
            with precision(device, autocast):
                losses = task.loss(model_logits(model, inputs, task), labels)
            loss = task.batch_loss(losses, labels)
            if not torch.isfinite(loss):
                raise TsqLoraError(
                    f"the loss on trusted rows is {float(loss.detach())} at a rate of {learning_rate:g}; lower "
                    "training.learning_rate, or look at the rows of data.trusted"
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _batches(
    rows: Dataset, collate: Collate, batch_size: int, steps: int, rng: np.random.Generator
) -> Callable[[], Generator[Batch]]:
    def generate() -> Generator[Batch]:
        order = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-steps * batch_size // len(rows)))])
        for step in range(steps):
            yield collate([rows[int(j)] for j in order[step * batch_size : (step + 1) * batch_size]])

    return generate
