"""One forward pass without dropout: losses, logits, and the input of the task's last linear layer.

For preference pairs first a pass of the reference model, whose log-ratios are a part of the loss.
"""

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tsqlora import distributed
from tsqlora.errors import UnsupportedError
from tsqlora.libs.peft import without_zero_updates
from tsqlora.libs.shapes import Float, Int
from tsqlora.libs.transformers import transformer_blocks
from tsqlora.model.eval_mode import eval_mode
from tsqlora.model.oom import halves, retry_on_oom
from tsqlora.model.passes import HALF, Columns, parts_of, run_pass
from tsqlora.model.request import Compute, LookRequest, RowNames
from tsqlora.rows.batches import IGNORED, sorted_batches
from tsqlora.rows.datasets import Dataset, lengths_of
from tsqlora.tasks import Batch, Collate, Task
from tsqlora.tasks.forward import base_model, continues, generates, output_part, precision, split_labels
from tsqlora.tasks.task import require_usable

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "identity": lambda x: x,
}
"""Activations between the dense and the last layer in the heads of transformers."""

Calls = Mapping[nn.Module, tuple[Tensor, Tensor]]
"""Input and output of each module's last call."""


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The last linear layer of a task, and the layer before it if that trains entirely, too."""

    name: str
    linear: nn.Linear
    dense: nn.Linear | None = None
    """Its output, through the activation, is the input of `linear`."""
    activation: str = "identity"


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """Results of the pass for every row, in the data set's order.

    Only the first process has features, dense inputs and means; in the others these have no rows.
    """

    labels: np.ndarray
    """Class ids, n × k of 0 and 1, or numbers; for text and tags the number of tokens with a target."""
    loss: np.ndarray
    logits: np.ndarray | None = None
    """n × k; None for generation."""
    features: np.ndarray | None = None
    """n × d: the input of the head's last linear layer; None without such a layer."""
    dense: np.ndarray | None = None
    """The input of the head's dense layer, if it has one."""
    mean: np.ndarray | None = None
    """n × h: the mean of the last hidden states over a row's tokens, on request; for text of those of a middle layer
    over its target, in an encoder-decoder over the tokens that predict it."""


def forward_pass(
    model: nn.Module,
    dataset: Dataset,
    collate: Collate,
    *,
    task: Task,
    compute: Compute,
    rows: RowNames | None = None,
    mean: bool = False,
    kind: str = "row",
) -> tuple[Forward, Head | None]:
    """Run the pass, in all processes; return its results and the head.

    `collate` must give each sample a row. With `mean` the rows' mean hidden states are recorded, too. Raises DataError
    for a label that the loss cannot use; `kind` says which rows they are.
    """
    rows = rows or RowNames()
    lengths = distributed.together(lambda: lengths_of(dataset) if rows.lengths is None else rows.lengths)
    exact = precision(next(model.parameters()).device, compute.autocast, cache=False)
    # In evaluation mode the global generators are restored: rows may draw random numbers, as augmentation does.
    with eval_mode(model), torch.no_grad(), without_zero_updates(model), exact:
        # If one process cannot read its rows, all raise the error.
        longest = sorted_batches(lengths, compute.batch_size)[0]
        head, first = distributed.together(partial(read_head, model, dataset, longest, collate, task, dimensions=2))
        parts = parts_of(model, compute, "forward", rows.hashes, list(lengths), task, mean)

        def measure(indices: np.ndarray, batch: Batch) -> Columns:
            inputs, labels = split_labels(batch, model)
            names = indices if rows.ids is None else np.asarray(rows.ids)[indices]
            usable = partial(require_usable, task, labels=labels, rows=names, kind=kind)
            columns = _columns(model, inputs, labels, task, head, usable, mean=mean)
            return {name: (x.float() if x.is_floating_point() else x).numpy(force=True) for name, x in columns.items()}

        how = {"lengths": lengths, "phase": "look", "first": first, "parts": parts, "shared": True}
        return Forward(**run_pass(model, measure, dataset, collate, compute, **how)), head


def _columns(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    task: Task,
    head: Head | None,
    usable: Callable[[Tensor], None],
    *,
    mean: bool,
) -> dict[str, Tensor]:
    """Measure a batch; `usable` checks its labels for the logits."""
    layers = [] if head is None else [layer for layer in (head.linear, head.dense) if layer is not None]
    writes = generates(base_model(model))
    with recorded(layers) as calls, hidden_states(model if mean else None, middle=writes) as states:
        logits = task.reading.logits(model, inputs)
    usable(logits)
    columns = {"labels": labels, "logits": logits}
    if logits.dim() == 3:  # of tokens, whose targets are counted
        columns = {"labels": labels[:, int(continues(base_model(model))) :].ne(IGNORED).sum(1)}
    columns["loss"] = sample_losses(task, logits, labels)
    state = mean_state(states, labels.ne(IGNORED) if writes else inputs.get("attention_mask"))
    if head is not None:
        columns["features"] = pooled(calls[head.linear][0], model, inputs)
        if head.dense is not None:
            columns["dense"] = calls[head.dense][0]
    # Too large hidden states are infinite in float16.
    return columns if state is None else {**columns, "mean": state.clamp(-HALF, HALF)}


def read_head(
    model: nn.Module, dataset: Dataset, rows: np.ndarray, collate: Collate, task: Task, *, dimensions: int
) -> tuple[Head | None, Batch | None]:
    """Find the head in a forward pass over some rows, fewer where memory is short; return the batch if it has all."""

    def find(size: int) -> tuple[Head | None, Batch | None]:
        batch = collate([dataset[int(j)] for j in rows[:size]])
        inputs, _ = split_labels(batch, model)
        return find_head(model, inputs, task, dimensions), batch if size == len(rows) else None

    return retry_on_oom(find, halves(len(rows)))


def find_head(model: nn.Module, inputs: Mapping[str, Tensor], task: Task, dimensions: int = 2) -> Head | None:
    """Return the trainable linear layer whose output is the logits of a batch; None where there is none.

    Logits of 2 `dimensions` are those of rows, of 3 those of tokens.

    The model is in evaluation mode. In a decoder, whose head runs at every token, the logits are one row of its output.
    """
    lora = {part for layer in model.modules() if isinstance(layer, LoraLayer) for part in layer.modules()}
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and module not in lora
    }
    if not linears:
        return None
    with torch.no_grad(), recorded(linears.values()) as calls:
        logits = task.reading.logits(model, inputs)
    if logits.dim() != dimensions:
        return None
    for name, linear in linears.items():
        if linear not in calls or linear.out_features != logits.shape[-1]:
            continue
        x, output = calls[linear]
        if logits.dim() == 2:
            x, output = (pooled(values, model, inputs) for values in (x, output))
        if output.shape == logits.shape and torch.allclose(output.to(logits), logits, atol=1e-5):
            return (
                Head(name, linear) if logits.dim() == 3 else Head(name, linear, *_dense_before(model, calls, linear, x))
            )
    return None


@contextmanager
def recorded(modules: Iterable[nn.Module]) -> Generator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Record input and output of each module's last call while open; at every token of the last such module only."""
    calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        (values,) = args or named.values()
        # A head at every token is the last such module; all would be gigabytes.
        for earlier in [m for m, (x, _) in calls.items() if x.dim() > 2 and values.dim() > 2]:
            del calls[earlier]
        calls[module] = (values.detach(), output.detach())

    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def hidden_states(model: nn.Module | None, *, early: bool = False, middle: bool = False) -> Generator[list[Tensor]]:
    """Record the last hidden states of a transformers model's body, call by call; nothing for other models.

    With `early` those after a third of the layers, if the call returns them; with `middle` those of a block halfway up,
    in an encoder-decoder of its decoder.
    """
    inner = None if model is None else base_model(model)
    states: list[Tensor] = []
    if not isinstance(inner, PreTrainedModel):
        yield states
        return

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        layers = output.get("hidden_states") if early and isinstance(output, Mapping) else None
        state = layers[len(layers) // 3] if layers else output_part(output, "last_hidden_state")
        if middle and state is None:  # of a block
            state = output[0] if isinstance(output, tuple) else output
        if isinstance(state, Tensor):
            states.append(state.detach())

    watched: nn.Module = inner.base_model
    if middle:  # the block halfway up the decoder, or up the only stack; the body itself if it has no blocks
        watched = getattr(watched, "decoder", watched)
        blocks = transformer_blocks(watched, [name for name, _ in watched.named_parameters()])
        watched = watched.get_submodule(blocks[(len(blocks) - 1) // 2]) if blocks else inner.base_model
    hook = watched.register_forward_hook(record)
    try:
        yield states
    finally:
        hook.remove()


def mean_state(states: Sequence[Float[Tensor, "n t h"]], mask: Tensor | None) -> Float[Tensor, "n h"] | None:
    """Return the mean of the last states over tokens without padding; None where they are not per token."""
    if not states or states[-1].dim() != 3:
        return None
    state = states[-1].float()
    if mask is None:
        return state.mean(dim=1)
    if mask.shape != state.shape[:2]:
        return None
    weights = mask.to(state)[..., None]
    return (state * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)


def pooled(values: Float[Tensor, "n *t d"], model: nn.Module, inputs: Mapping[str, Tensor]) -> Float[Tensor, "n d"]:
    """Return values at the last token that is no padding, where decoders of transformers classify; others unchanged."""
    ids = inputs.get("input_ids")
    if values.dim() != 3 or (ids is not None and ids.shape != values.shape[:2]):
        return values
    config = getattr(base_model(model), "config", None)
    pad = config.get_text_config().pad_token_id if isinstance(config, PretrainedConfig) else None
    if ids is None or pad is None:
        return values[:, -1]
    places = torch.arange(ids.shape[1], device=ids.device)
    return values[torch.arange(len(values)), (places * (ids != pad)).argmax(1).to(values.device)]


def _dense_before(
    model: nn.Module, calls: Calls, linear: nn.Linear, features: Float[Tensor, "n d"]
) -> tuple[nn.Linear | None, str]:
    inner = base_model(model)
    body = inner.base_model if isinstance(inner, PreTrainedModel) else inner
    inside = set() if body is inner else {*body.modules()}
    for module, (x, output) in calls.items():
        if not isinstance(module, nn.Linear) or module is linear or module.bias is None or x.dim() != 2:
            continue
        # A layer of the body was trained before, as BERT's pooler, unless its bias is zero.
        if (module in inside and module.bias.any()) or output.shape != features.shape:
            continue
        for name, activation in ACTIVATIONS.items():
            if torch.allclose(activation(output).to(features), features, atol=1e-5):
                return module, name
    return None, "identity"


@dataclass(frozen=True, slots=True, eq=False)
class WithReference:
    """Rows with the log-ratio of the reference model, as `reference`."""

    rows: Dataset
    reference: Float[np.ndarray, " n"]
    tokens: Int[np.ndarray, " n"]
    """Target tokens of both answers."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return {**self.rows[i], "reference": float(self.reference[i])}

    def forward(self) -> Forward:
        """Return the result of a forward pass of the reference model itself."""
        return Forward(self.tokens, np.full(len(self), math.log(2), dtype=np.float32))


def with_reference(model: nn.Module, request: LookRequest) -> LookRequest:
    """Take the model as it stands for the reference, and measure its log-ratios of all rows in a forward pass."""

    def measured(dataset: Dataset, **options: Any) -> WithReference:
        forward, _ = forward_pass(model, dataset, request.collate, task=request.task, **options)
        assert forward.logits is not None
        return WithReference(dataset, forward.logits[:, 0], forward.labels)

    compute, trusted = request.compute, request.trusted
    pool = measured(request.dataset, compute=compute, rows=request.rows)
    if trusted is not None:
        trusted = measured(trusted, compute=replace(compute, parts=None, progress=None))
    return replace(request, dataset=pool, trusted=trusted)


def sample_losses(task: Task, logits: Float[Tensor, "n *k"], labels: Tensor) -> Float[Tensor, " n"]:
    """Return the task's loss per sample; raise UnsupportedError if that is not one number per sample."""
    losses = task.loss(logits, labels)
    if losses.shape != (len(logits),):
        raise UnsupportedError(
            f"the loss of {len(logits)} samples has shape {tuple(losses.shape)}; return one number per sample"
        )
    return losses
