"""Weights of rows in any training whose loss is a mean of the rows' own: no loss function changes.

The gradient of Σ wᵢ ℓᵢ / n by the weights θ is that of Σ ℓᵢ / n with each row's gradient at the logits times wᵢ:
that is done where a backward pass comes to the logits, and it commutes with accumulation and loss scale.
The loss that the Trainer logs stays the one without weights.
"""

import weakref
from collections.abc import Callable, Generator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_compiled_module
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import TrainingArguments

from tsqlora import distributed
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.gradients.ghost import wide
from tsqlora.quality.own_loss import by_logits, scale_of, source_of
from tsqlora.quality.passes import Passes
from tsqlora.quality.reference import sample_losses
from tsqlora.quality.subset import QualitySubset
from tsqlora.tasks import Task, get_task, require_answers
from tsqlora.tasks.forward import task_of

See = Callable[[Int[Tensor, " n"], Float[Tensor, " n"]], None]
"""Told the rows of each training forward, and their losses in it."""


class RowWeights:
    """Multiplies each row's gradient by its weight in a QualitySubset, in the training passes between start and stop.

    Args:
        data: the Trainer's train_dataset.
        name: of who weighs, for errors.
        task: its loss must be training's, up to one factor a batch; by default what the model's config says, with the
            Trainer's label smoothing.

    While it is open a forward raises SettingsError where its rows were not announced; a backward
    UnsupportedError where training's loss is not the task's, so that no row has a weight of its own.
    """

    def __init__(self, data: QualitySubset, name: str, *, task: Task | None = None) -> None:
        self.data, self.name, self._given = data, name, task
        self._weights: Tensor | None = None
        self._open_now = self._waiting = self._passed = False
        self._open = ExitStack()
        weakref.finalize(self, self._open.close)  # where an epoch failed, at the latest on exit

    def begin(self, args: TrainingArguments, model: nn.Module) -> None:
        """On train begin.  Raises SettingsError or UnsupportedError naming what hides rows or logits."""
        take_over(model, self.name, self._open)
        require_rows_seen(args, self.name)
        distributed.refuse_copies(args.n_gpu)
        if args.torch_compile or is_compiled_module(model):
            raise UnsupportedError(
                f"compiled code does not show {self.name} the gradient at the logits; leave out torch_compile"
            )
        self.task = require_answers(trained_task(args, model, self._given), self.name)
        self._passes = Passes(labels_of(self.data))

    def start(self, model: nn.Module, see: See | None = None) -> None:
        """On epoch begin, once its rows are drawn; `see` is told losses, also where there are no weights."""
        self.stop()
        if self.data.weights is not None or see is not None:
            self._open.enter_context(self._watch(model, see))

    def end(self) -> None:
        """On epoch end.  Raises UnsupportedError where no backward pass came by the logits."""
        missed = self._open_now and not self._passed
        self.stop()
        if missed:
            raise self._not_by_logits()

    def stop(self) -> None:
        """Leaves nothing on the model and the data."""
        self._open.close()

    @contextmanager
    def _watch(self, model: nn.Module, see: See | None) -> Generator[None]:
        self._passes.clear()
        self._waiting = self._passed = False
        self._weights = None
        if self.data.weights is not None:
            self._weights = torch.ones(len(self.data.dataset), dtype=torch.float64)
            self._weights[self.data.indices] = torch.as_tensor(self.data.weights)

        def leave(module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._forward(module, kwargs, output, see)

        handle = model.register_forward_hook(leave, with_kwargs=True)
        self._open_now = True
        try:
            with self.data.announcing(self._passes.coming):
                yield
        finally:
            self._open_now = False
            handle.remove()

    def _forward(self, module: nn.Module, kwargs: Mapping[str, Any], output: Any, see: See | None) -> None:
        passed = self._passes.seen(module, kwargs, output)
        if passed is None:
            return
        if self._waiting:
            raise self._not_by_logits()
        logits = wide(passed.logits.detach())
        if see is not None:
            with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
                see(passed.rows, sample_losses(self.task, logits, passed.labels))
        own = by_logits(self.task, logits, passed.labels)
        weights = None if self._weights is None else self._weights[passed.rows].to(logits)
        node, place = source_of(passed.logits)
        node.register_prehook(lambda grads: self._weigh(grads, place, own, weights))
        self._waiting = True

    def _weigh(
        self,
        grads: tuple[Tensor | None, ...],
        place: int,
        own: Float[Tensor, "n k"],
        weights: Float[Tensor, " n"] | None,
    ) -> tuple[Tensor | None, ...] | None:
        """A backward pass has come to the logits."""
        grad = grads[place]
        if grad is None:
            raise self._not_by_logits()
        self._waiting, self._passed = False, True
        # Where a loss scale overflows training skips the step as well.
        if bool(grad.isfinite().all()):
            scale_of(grad, own, self.task.name)
        if weights is None:
            return None
        weighted = (wide(grad) * weights[:, None]).to(grad.dtype)
        return (*grads[:place], weighted, *grads[place + 1 :])

    def _not_by_logits(self) -> UnsupportedError:
        return UnsupportedError(
            f"training's loss does not come by way of the model's logits, where {self.name} weighs rows; use a loss of "
            "the logits, or leave it out"
        )


def take_over(model: nn.Module, name: str, hung: ExitStack) -> None:
    """On train begin: takes down what a training of the model that failed, or was interrupted, left on it.

    Its Trainer may be alive still, as in a notebook, which keeps the frames of the last error.
    `hung` is what `name` will hang on the model in this one.
    """
    of_model = _HUNG.setdefault(model, weakref.WeakValueDictionary())
    for left in (of_model.get(name, hung), hung):
        left.close()
    of_model[name] = hung


_HUNG: MutableMapping[nn.Module, MutableMapping[str, ExitStack]] = weakref.WeakKeyDictionary()
"""By model and name; it keeps neither the model nor what hangs on it alive."""


def require_rows_seen(args: TrainingArguments, name: str) -> None:
    """Raises SettingsError where other processes hand out the rows."""
    if args.dataloader_num_workers:
        raise SettingsError(f"{name} must see which rows are handed out; set dataloader_num_workers to 0")


def labels_of(data: QualitySubset) -> np.ndarray:
    """Of all rows, by row number.  Raises DataError for rows without the column 'labels'."""
    rows: Any = data.dataset
    if "labels" not in rows[0]:
        raise DataError(f"rows have the columns {', '.join(rows[0])}, and labels are read from 'labels'; rename theirs")
    return np.array([row["labels"] for row in rows])


def trained_task(args: TrainingArguments, model: nn.Module, given: Task | None) -> Task:
    """The given task, or the model's own with the Trainer's label smoothing."""
    smoothing = args.label_smoothing_factor
    if given is not None:
        return given
    return get_task(task_of(model).name, label_smoothing=smoothing) if smoothing else task_of(model)
