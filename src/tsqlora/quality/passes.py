"""Training's own forward passes, and which rows each of them has.

Rows are announced in the order in which they are handed out; each training forward takes its own off.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.tasks.forward import output_part


@dataclass(frozen=True, slots=True)
class Pass:
    """One training forward."""

    rows: Int[Tensor, " n"]
    labels: Tensor
    """The rows' own, where the logits are."""
    logits: Float[Tensor, "n k"]
    """With the graph that made them."""


class Passes:
    """Tells the rows of each training forward.

    Args:
        labels: of all rows, by row number, as the collator gives them; a batch that has others is an error.
    """

    def __init__(self, labels: Sequence[int] | Sequence[float] | np.ndarray) -> None:
        self.labels = torch.as_tensor(labels)
        self._coming: deque[int] = deque()

    def coming(self, rows: Iterable[int]) -> None:
        """Row numbers in the order in which training will see them."""
        self._coming.extend(int(row) for row in rows)

    def clear(self) -> None:
        """Forgets rows that were announced and not trained on."""
        self._coming.clear()

    def seen(self, module: nn.Module, kwargs: Mapping[str, Any], output: Any) -> Pass | None:
        """What a forward of the model was given and gave; None where it is not one of training.

        Raises UnsupportedError where there are no logits of one row a sample, SettingsError
        where the batch's rows were not announced.
        """
        if not (module.training and torch.is_grad_enabled()):
            return None
        logits = _logits(output)
        rows = self._take(len(logits))
        labels = self.labels[rows].to(logits.device)
        _require_same(labels, kwargs.get("labels"), rows)
        return Pass(rows, labels, logits)

    def _take(self, samples: int) -> Int[Tensor, " n"]:
        if len(self._coming) < samples:
            raise SettingsError(
                f"a training batch has {samples} rows, and {len(self._coming)} were announced; call coming() "
                "where rows are handed out, in this process (dataloader_num_workers=0)"
            )
        return torch.tensor([self._coming.popleft() for _ in range(samples)])


def _logits(output: Any) -> Tensor:
    logits = output_part(output, "logits")
    if logits is None or logits.dim() != 2:
        raise UnsupportedError("the model's output has no logits of one row a sample; score in a pass of its own")
    return logits


def _require_same(labels: Tensor, given: Any, rows: Tensor) -> None:
    """Raises SettingsError where a batch's labels are not those of the rows that were announced."""
    # In the batch's precision: a decimal number is another one in float64.
    if isinstance(given, Tensor) and not torch.equal(given, labels.to(given)):
        raise SettingsError(
            f"a training batch has other labels than rows {rows[:4].tolist()}..., which were announced for it; call "
            "coming() in the order in which rows are trained on"
        )
