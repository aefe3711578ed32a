"""Layer sensitivity, and the probe that measures it.

A probe watches any backward pass: a separate one over the quality sample, or that of a training step.
"""

import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tsqlora import distributed
from tsqlora.errors import SettingsError, UnsupportedError, of_loaded_model
from tsqlora.libs.shapes import Float, Int, Shaped
from tsqlora.libs.torch import double, upcast
from tsqlora.model.passes import Columns, run_pass
from tsqlora.model.request import Compute
from tsqlora.paper.budget import Sensitivity
from tsqlora.paper.capture import Capture, capture
from tsqlora.paper.sites import effective_weight, lora_layers, target_site
from tsqlora.seeds import stream
from tsqlora.tasks import Batch, Collate, Task, task_of
from tsqlora.tasks.forward import split_labels

CHUNK = 2**21
"""Entries of per-sample gradients in memory at a time."""
SAMPLED_OUTPUTS = 64
SKETCH_ROWS = 8


def sampled(a: Shaped[Tensor, "n t *i"], b: Float[Tensor, "n t o"], layer: LoraLayer) -> Tensor:
    """Return Σ over samples of mean |W ⊙ ∇W ℓ|, docs/method.md eq. 6, over every k-th output and all inputs.

    A wide layer has 49 to 127 of its outputs measured: the cost of eq. 6 grows with the size of the weight, not with
    the length of a sample, and dominates for short ones. The absolute value is per sample, so that values add up over
    batches and processes. If b is in half precision, entries are rounded to it, as in training.
    """
    every = stride(b.shape[2])
    weight, b = effective_weight(layer, every=every).abs().to(upcast(b)), b[..., ::every]
    if _is_lookup(layer):
        # The gradient of a sample's lookups has nonzero rows at its tokens alone.
        vocabulary, b = weight.shape[1], upcast(b)
        keys = a + vocabulary * torch.arange(len(a), device=a.device)[:, None]
        unique, places = torch.unique(keys, return_inverse=True)
        rows = b.new_zeros(len(unique), b.shape[2]).index_add_(0, places.flatten(), b.flatten(0, 1))
        return (rows.abs() * weight.T[unique % vocabulary]).sum() / weight.numel()
    a, flat = a.to(b), weight.flatten()
    step = max(1, CHUNK // (a.shape[2] * b.shape[2]))  # small enough for the processor's cache
    grads = (upcast(b[k : k + step].mT @ a[k : k + step]) for k in range(0, len(a), step))
    return torch.stack([(grad.abs_().flatten(1) @ flat).sum() for grad in grads]).sum() / weight.numel()


def stride(outputs: int) -> int:
    """Return the step between the outputs that `sampled` takes.

    Never a multiple of 16, which would hit few positions of each attention head, and rotary frequencies differ there.

    >>> [stride(outputs) for outputs in (64, 384, 1536, 2048, 4096)]
    [1, 6, 24, 37, 69]
    """
    every = max(1, outputs // SAMPLED_OUTPUTS)
    return every + 5 if every % 16 == 0 else every


def sensitivity_rows(rows: int, samples: int, seed: int) -> Int[np.ndarray, " m"]:
    """Draw the rows to measure sensitivities on, ascending."""
    return np.sort(stream("sensitivity rows", seed).permutation(rows)[:samples])


@dataclass(slots=True)
class Probe:
    """Accumulates each layer's sensitivity and gradient sketch over the backward passes it watches."""

    layers: Mapping[str, LoraLayer]
    seed: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)
    sketches: dict[str, Tensor] = field(default_factory=dict)

    def watch(self, model: nn.Module) -> AbstractContextManager[Capture]:
        """Add every backward pass of `model` while open."""
        return capture(model, {name: target_site(name, layer) for name, layer in self.layers.items()}, self._add)

    def sensitivity(self) -> Sensitivity:
        """Return the mean over the samples of all processes; 0 for an unused layer."""
        zero = self._zero()
        values = distributed.summed(
            torch.stack([double(self.totals[name]) if name in self.totals else zero for name in self.layers])
        )
        # A pass may skip a layer, so the layer with the most samples has the total.
        samples = int(distributed.summed(torch.tensor(max(self.samples.values(), default=0), device=zero.device)))
        if samples == 0:
            raise UnsupportedError(
                "no backward pass went through the LoRA layers while the probe was watching; with reentrant gradient "
                "checkpointing, set gradient_checkpointing_kwargs to {'use_reentrant': False}"
            )
        return Sensitivity(
            {name: float(value) / samples for name, value in zip(self.layers, values, strict=True)},
            {name: _shape(layer) for name, layer in self.layers.items()},
            samples,
        )

    def directions(self) -> dict[str, Float[Tensor, "k i"]]:
        """Return Ω ∇W of each layer, summed over samples and processes; Ω is k × o."""
        zero = self._zero()
        unseen = {name: zero.new_zeros(SKETCH_ROWS, _shape(layer)[0]) for name, layer in self.layers.items()}
        return {
            name: distributed.summed(double(self.sketches[name]) if name in self.sketches else zeros)
            for name, zeros in unseen.items()
        }

    def _zero(self) -> Tensor:
        """Return zero in the dtype and on the device in which processes add up."""
        layer = cast(nn.Module, next(iter(self.layers.values())))
        return double(torch.zeros((), device=next(layer.parameters()).device))

    def _add(self, name: str, a: Tensor, b: Tensor) -> None:
        value = sampled(a, b, self.layers[name])
        # Of a layer the same matrix for every step and process of a seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{name}".encode()))
        omega = torch.randn(SKETCH_ROWS, b.shape[2], generator=generator) / SKETCH_ROWS**0.5
        sketched = omega.to(upcast(b)) @ upcast(b).flatten(0, 1).T
        if _is_lookup(self.layers[name]):
            inputs, _ = _shape(self.layers[name])
            sketch = sketched.new_zeros(len(sketched), inputs).index_add_(1, a.flatten(), sketched)
        else:
            sketch = sketched @ a.flatten(0, 1).to(sketched)
        self.samples[name] = self.samples.get(name, 0) + len(a)
        self.totals[name] = self.totals.get(name, 0) + value
        self.sketches[name] = self.sketches.get(name, 0) + sketch


@of_loaded_model
def sensitivity(
    model: nn.Module,
    dataset: Any,
    collate: Collate,
    *,
    task: Task | None = None,
    batch_size: int = 32,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> Sensitivity:
    """Measure each LoRA layer's sensitivity on these samples: docs/method.md eq. 6.

    Args:
        dataset: the samples to measure on; the published method uses the quality sample.

    Costs one forward and one backward pass, and leaves the model unchanged. Raises UnsupportedError for a model without
    LoRA layers.
    """
    options = {"task": task, "batch_size": batch_size, "seed": seed, "autocast": autocast}
    return probe_pass(model, dataset, collate, **options).sensitivity()


def probe_pass(
    model: nn.Module,
    dataset: Any,
    collate: Collate,
    *,
    task: Task | None = None,
    batch_size: int = 32,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> Probe:
    """Run a separate pass over the samples for sensitivities and gradient sketches."""
    model = distributed.unwrapped(model)
    layers = lora_layers(model)
    if not layers:
        raise UnsupportedError("the model has no LoRA layers to measure; make it with tsqlora.wrap, or with PEFT")
    if len(dataset) == 0:
        raise SettingsError("there are no rows to measure sensitivity on")
    task = task or task_of(model)
    probe = Probe(layers, seed)

    def measure(_: np.ndarray, batch: Batch) -> Columns:
        inputs, labels = split_labels(batch, model)
        before = dict(probe.samples), dict(probe.totals), dict(probe.sketches)
        try:
            losses = task.loss(task.reading.logits(model, inputs), labels)
            # Summed, not averaged: a sample's gradient must not depend on its batch.
            torch.autograd.grad(losses.sum(), [tap.anchor], allow_unused=True)
        except Exception:  # memory was short: the batch comes again in parts
            probe.samples, probe.totals, probe.sketches = before
            raise
        return {}

    with torch.enable_grad(), probe.watch(model) as tap:
        run_pass(model, measure, dataset, collate, Compute(batch_size, autocast))
    return probe


def _is_lookup(layer: LoraLayer) -> bool:
    return isinstance(layer.get_base_layer(), nn.Embedding)


def _shape(layer: LoraLayer) -> tuple[int, int]:
    return cast(int, layer.in_features), cast(int, layer.out_features)
