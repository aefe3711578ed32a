"""Each sample's terms from training's own backward passes, with no pass of their own.

Training's loss is c times the sum of the samples' own losses, whatever reduces, accumulates or
scales it; c is read off the gradient that arrives at the logits, and undone. `convergence`
compares a batch with a fading mean gradient, which it joins afterwards: no sample vouches for
itself. What is had so is not exact: weights move between batches, and dropout is on.
"""

import math
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.gradients.capture import Capture, capture
from tsqlora.gradients.ghost import (
    Explicit,
    GainGradient,
    Kind,
    LayerGradient,
    Linear,
    MeanGradient,
    layer_gradient,
    weight_gradient,
    wide,
)
from tsqlora.gradients.sites import Scope, Site, batch_coupled, find_sites
from tsqlora.quality.learned import LearnedTest, learned
from tsqlora.quality.own_loss import by_logits, scale_of, source_of
from tsqlora.quality.passes import Passes
from tsqlora.quality.reference import sample_losses, total_over_sites
from tsqlora.quality.rows import REFERENCE_ROWS
from tsqlora.quality.terms import TERMS, Measured
from tsqlora.tasks import Task, require_answers
from tsqlora.tasks.forward import task_of

WINDOW = 256
"""Rows trained on last, by whose logits the next batch is calibrated."""


@dataclass(slots=True)
class _Batch:
    """One training forward, and what its backward has shown."""

    rows: Int[Tensor, " n"]
    logits: Float[Tensor, "n k"]
    own: Float[Tensor, "n k"]
    """Gradient of the sum of the samples' own losses by the logits."""
    calibration: Float[Tensor, " n"]
    """By what calibration multiplies each sample's gradient."""
    factor: Float[Tensor, " n"] | None = None
    """calibration / c, once the backward has begun; None still where that overflowed."""
    norms: list[Tensor] = field(default_factory=list[Tensor])
    dots: list[Tensor] = field(default_factory=list[Tensor])
    sums: dict[str, MeanGradient] = field(default_factory=dict[str, MeanGradient])


class Harvest:
    """Collects each row's terms from the training passes that it watches; a later pass replaces an earlier one's.

    Args:
        model: as it trains, not wrapped for several processes.
        labels: of all rows, by row number, as the collator gives them.
        task: its loss must be training's, up to one factor a batch; by default what the model's config says.
        gradient: whether to look at gradients at all; what the logits alone say costs nothing.
        memory: in rows; the mean gradient fades so that it is as noisy as the mean of this many.
        calibration: as if logits leaned to no class over the last WINDOW rows. A sample's
            gradient is then exact for one or two logits, and projected on its own direction for more.

    Raises UnsupportedError naming what has no gradient per sample; SettingsError.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Sequence[int] | Sequence[float] | np.ndarray,
        *,
        task: Task | None = None,
        scope: Scope = "adapter",
        gradient: bool = True,
        memory: int = REFERENCE_ROWS,
        calibration: bool = True,
    ) -> None:
        if coupled := batch_coupled(model):
            raise UnsupportedError(f"{coupled[0]} couples the samples of a batch: no sample has a loss of its own")
        if memory < 1:
            raise SettingsError(f"memory is {memory}; it must be at least 1 row")
        self.sites: Mapping[str, Site] = find_sites(model, scope) if gradient else {}
        self.task = require_answers(task_of(model) if task is None else task, "harvest")
        self.memory, self.calibration = memory, calibration
        self._passes = Passes(labels)
        self.labels = self._passes.labels
        rows = len(self.labels)
        self.logits: Tensor | None = None
        """n × k, not calibrated; NaN for a row that was not seen."""
        self.offsets: list[Float[Tensor, " k"]] = []
        """What calibrated each batch."""
        self.batch_of = torch.full((rows,), -1)
        """The batch that a row was last in, -1 for none."""
        self._norm = torch.full((rows,), torch.nan, dtype=torch.float64)
        self._convergence = self._norm.clone()
        self._recent: deque[int] = deque(maxlen=WINDOW)
        self._offset: Tensor | None = None
        self._mean: dict[str, MeanGradient] = {}
        self._mean_norm = 0.0
        self._waiting: _Batch | None = None
        self._current: _Batch | None = None

    def coming(self, rows: Iterable[int]) -> None:
        """Row numbers in the order in which training will see them; each training forward takes its own off."""
        self._passes.coming(rows)

    @contextmanager
    def watch(self, model: nn.Module) -> Generator[None]:
        """While open, forwards in train mode that want gradients are harvested, and others are left alone.

        Nothing is run and no gradient is changed; nothing is left on the model. A backward raises
        UnsupportedError where training's loss is not the task's, a forward SettingsError where
        its rows were not announced.
        """
        self._passes.clear()
        with capture(model, self.sites, self._see) as tap:

            def leave(module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                self._forward(tap, module, kwargs, output)

            handle = model.register_forward_hook(leave, with_kwargs=True)
            try:
                yield
                tap.finish()
                self._finish()
            finally:
                handle.remove()
                self._waiting = self._current = None

    def terms(self) -> dict[str, Float[np.ndarray, " n"]]:
        """Every term of TERMS that one pass can give, of each row; NaN where it is not known.

        A row that no pass held has none; `convergence` and `cosine` need an earlier batch.
        """
        seen = self.batch_of >= 0
        if not seen.any():
            return {}
        measured = self._measured(seen)
        found: dict[str, np.ndarray] = {}
        for name, term in TERMS.items():
            if not (term.lookahead or term.alone) and (self.sites or not term.gradient):
                found[name] = np.full(len(seen), np.nan)
                found[name][seen.numpy()] = term.of(measured).numpy()
        return found

    def learned(self, rows: int = REFERENCE_ROWS) -> LearnedTest:
        """Whether the model beat chance on the rows that it was trained on last, as it was before that."""
        assert self.logits is not None
        last = self.batch_of.argsort(stable=True)[-rows:]
        last = last[self.batch_of[last] >= 0]
        logits, labels = self.logits[last], self.labels[last]
        chance = self.task.chance(labels, logits.shape[1]).to(logits).expand_as(logits).contiguous()
        return learned(sample_losses(self.task, logits, labels), sample_losses(self.task, chance, labels))

    def record(self) -> dict[str, Any]:
        """How the terms came to be, for the scores' record."""
        return {
            "harvested": True,
            "exact": False,
            "memory": self.memory,
            "calibration_rows": WINDOW if self.calibration else 0,
            "batches": len(self.offsets),
            "unseen": int((self.batch_of < 0).sum()),
            "without_convergence": int(self._convergence.isnan().sum()),
        }

    def calibrated(self) -> Float[Tensor, "n k"]:
        """Each row's logits, with the offsets of the batch that it was last in; NaN for a row that was not seen."""
        assert self.logits is not None
        return self.logits + torch.stack(self.offsets)[self.batch_of]

    def _measured(self, seen: Tensor) -> Measured:
        logits, labels = self.calibrated()[seen], self.labels[seen]
        loss = sample_losses(self.task, logits, labels)
        if not self.sites:
            return Measured(logits=logits, labels=labels, loss=loss)
        return Measured(logits, labels, loss, self._norm[seen].square(), self._convergence[seen], reference_norm=1.0)

    def _forward(self, tap: Capture, module: nn.Module, kwargs: Mapping[str, Any], output: Any) -> None:
        self._finish()
        self._waiting = None
        # Passes that are over are let go: a run has as many as it has batches.
        del tap.forwards[:-1]
        passed = self._passes.seen(module, kwargs, output)
        if passed is None:
            return
        logits = passed.logits.detach()
        own, calibration = self._own_gradient(wide(logits), passed.labels)
        batch = self._waiting = _Batch(passed.rows, logits, own, calibration)
        node, place = source_of(passed.logits)
        node.register_prehook(lambda grads: self._arrive(batch, grads[place]))

    def _own_gradient(
        self, logits: Float[Tensor, "n k"], labels: Tensor
    ) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
        """Of each sample's own loss by its logits; and by what calibration multiplies it.

        The multiple is that nearest to the calibrated loss's gradient, and it is that gradient
        where all gradients by one sample's logits are multiples of one: for one or two logits.
        """
        own = by_logits(self.task, logits, labels)
        if self._offset is None:
            return own, torch.ones_like(own[:, 0])
        calibrated = by_logits(self.task, logits + self._offset.to(logits), labels)
        square = own.square().sum(1)
        return own, torch.where(square > 0, (own * calibrated).sum(1) / square, 1)

    def _arrive(self, batch: _Batch, grad: Tensor | None) -> None:
        """The backward has come to the logits, and so to no site yet."""
        self._finish()
        self._waiting, self._current = None, batch
        # Where a loss scale overflows training skips the step as well; where it is 0 nothing can be told.
        if grad is not None and bool(grad.isfinite().all()):
            scale = scale_of(grad, batch.own, self.task.name)
            batch.factor = batch.calibration / scale if scale else None

    def _see(self, name: str, a: Tensor, b: Tensor) -> None:
        """What a site's backward shows of the batch under way."""
        batch, site = self._current, self.sites[name]
        if batch is None and self._waiting is not None:
            raise UnsupportedError(
                f"{name} has a gradient that did not come by way of the model's logits: training's loss is not the "
                f"{self.task.name} loss; score in a pass of its own"
            )
        if batch is None or batch.factor is None:
            return
        gradient = _gradient(a, b, site)
        batch.norms.append(gradient.norm_sq())
        summed = batch.sums[name] = _weighted_sum(gradient, a, b, batch.factor, site.kind)
        if name in self._mean and _alike(summed, self._mean[name]):
            batch.dots.append(gradient.dot(self._mean[name]))

    def _finish(self) -> None:
        """The backward under way is over: its rows are noted, then it joins the mean and the window."""
        batch, self._current = self._current, None
        if batch is None or batch.factor is None:
            return
        factor = batch.factor.double().cpu()
        norm = total_over_sites(batch.norms, batch.factor).sqrt().double().cpu() * factor.abs()
        dot = total_over_sites(batch.dots, batch.factor).double().cpu() * factor
        if bool(norm.isfinite().all()) and bool(batch.logits.isfinite().all()):
            self._note(batch, norm, dot / self._mean_norm if self._mean_norm else torch.full_like(dot, torch.nan))
            self._join(batch)

    def _note(self, batch: _Batch, norm: Float[Tensor, " n"], convergence: Float[Tensor, " n"]) -> None:
        logits = batch.logits.float().cpu()
        if self.logits is None:
            self.logits = torch.full((len(self.labels), logits.shape[1]), torch.nan)
        self.logits[batch.rows], self._norm[batch.rows] = logits, norm
        self._convergence[batch.rows] = convergence
        self.batch_of[batch.rows] = len(self.offsets)
        self.offsets.append(torch.zeros(logits.shape[1]) if self._offset is None else self._offset)

    def _join(self, batch: _Batch) -> None:
        assert self.logits is not None
        # Σ over batches of squared weights is that of a plain mean of `memory` rows.
        fade = math.exp(-2 * len(batch.rows) / self.memory)
        old = {name: mean.scaled(fade) for name, mean in self._mean.items()}
        # A layer whose rank has changed begins anew.
        self._mean = old | {n: s.plus(old[n]) if n in old and _alike(s, old[n]) else s for n, s in batch.sums.items()}
        if self._mean:
            self._mean_norm = float(torch.stack([mean.norm_sq() for mean in self._mean.values()]).sum().sqrt())
        self._recent.extend(batch.rows.tolist())
        if self.calibration:
            window = list(self._recent)
            self._offset = self.task.offsets(self.logits[window], self.labels[window])


def _alike(x: MeanGradient, y: MeanGradient) -> bool:
    return x.weight is None or y.weight is None or x.weight.shape == y.weight.shape


def _gradient(a: Tensor, b: Tensor, site: Site) -> LayerGradient:
    """As `layer_gradient`; of a linear layer that widens, such as LoRA's B, the gradient of the weight's transpose.

    Norms and dot products are the same, and aᵀb is several times faster than bᵀa where i < o (a CPU, n × t × 8).
    """
    gradient = layer_gradient(a, b, weight=site.weight and not _widens(a, b, site.kind), bias=site.bias, kind=site.kind)
    if site.weight and gradient.weight is None:
        return LayerGradient(weight_gradient(b, a.to(b.dtype)), gradient.bias)
    return gradient


def _widens(a: Tensor, b: Tensor, kind: Kind) -> bool:
    return isinstance(kind, Linear) and a.shape[2] < b.shape[2]


def _weighted_sum(
    gradient: LayerGradient, a: Tensor, b: Tensor, weights: Float[Tensor, " n"], kind: Kind
) -> MeanGradient:
    """Σ weight · gradient over the samples; from the samples' own where those exist already."""
    weight = None
    if isinstance(gradient.weight, Explicit | GainGradient):
        own = wide(gradient.weight.weight)
        weight = (weights.to(own) @ own.flatten(1)).view(own.shape[1:])
    elif gradient.weight is not None:
        weight = kind.summed(a, b * weights.to(b)[:, None, None])
        weight = weight.mT if _widens(a, b, kind) else weight
    bias = None if gradient.bias is None else weights.to(gradient.bias) @ gradient.bias
    return MeanGradient(weight, bias)
