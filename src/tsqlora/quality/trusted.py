"""The trusted model θ_R: the run's model, trained on trusted rows alone, and what it says of other rows.  METHOD 1.2.

Formulas after RHO-loss (Mindermann et al. 2022) and CoLoR-Filter (Brandfonbrener et al. 2024).
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from tsqlora.errors import TsqLoraError
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Batch, Collate, model_logits, precision, split_labels

BATCH_SIZE = 16
STEPS = 100
STEPS_OF_TEXT = 24
RATE = 2.0
"""Times the run's learning rate."""


@contextmanager
def trusted_model(
    model: nn.Module,
    rows: Sequence[Any],
    collate: Collate,
    *,
    task: Task,
    learning_rate: float,
    steps: int,
    batch_size: int = BATCH_SIZE,
    autocast: torch.dtype | None = None,
    rng: np.random.Generator,
) -> Generator[None]:
    """While open, the model is trained on these rows alone; afterwards it is as it was, bit for bit.

    AdamW without weight decay, without dropout, at a constant rate; a fresh order in each pass over the rows. Weights,
    gradients, modes and the state of the random generators are restored, also after an error. Raises TsqLoraError where
    a loss is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [(p, p.detach().clone(), p.grad) for p in parameters]
    with eval_mode(model):
        try:
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
    rows: Sequence[Any], collate: Collate, batch_size: int, steps: int, rng: np.random.Generator
) -> Callable[[], Generator[Batch]]:
    def generate() -> Generator[Batch]:
        order = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-steps * batch_size // len(rows)))])
        for step in range(steps):
            yield collate([rows[int(j)] for j in order[step * batch_size : (step + 1) * batch_size]])

    return generate


def reducible_loss(
    loss: Float[np.ndarray, " n"], trusted: Float[np.ndarray, " n"], *, relative: bool = False
) -> Float[np.ndarray, " n"]:
    """R_i = ℓ_i(θ) − ℓ_i(θ_R), eq. 3′; `relative` divides by ℓ_i(θ), for text.

    >>> reducible_loss(np.array([2.0, 1.0]), np.array([1.0, 3.0])).tolist()
    [1.0, -2.0]
    """
    difference = loss - trusted
    return difference / np.maximum(loss, np.finfo(loss.dtype).tiny) if relative else difference


def gate_classes(
    trusted: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"], trusted_labels: Int[np.ndarray, " m"]
) -> Bool[np.ndarray, " n"]:
    """Which rows pass: θ_R finds the label at least as likely as its share among the trusted rows.

    `trusted` are the rows' cross-entropies under θ_R. A class without a trusted row is not judged: its rows pass.
    """
    width = int(max(labels.max(), trusted_labels.max())) + 1
    share = np.bincount(trusted_labels, minlength=width) / len(trusted_labels)
    return (np.exp(-trusted) >= share[labels]) | (share[labels] == 0)


def gate_numbers(trusted: Float[np.ndarray, " n"], trusted_numbers: Float[np.ndarray, " m"]) -> Bool[np.ndarray, " n"]:
    """Which rows pass: θ_R's squared error is at most the variance of the trusted rows' numbers."""
    return trusted <= trusted_numbers.var()
