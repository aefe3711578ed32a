"""One forward pass without dropout: losses, logits, and the input of the task's last linear layer."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tsqlora import distributed
from tsqlora.compat.peft import without_zero_updates
from tsqlora.compat.shapes import Float
from tsqlora.compat.transformers import transformer_blocks
from tsqlora.data.batches import sorted_batches
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.oom import halves, retry_on_oom
from tsqlora.quality.passes import Columns, Journal, identity_of, run_batches
from tsqlora.quality.reference import sample_losses
from tsqlora.quality.rows import Dataset, lengths_of
from tsqlora.quality.rule import Compute, RowNames
from tsqlora.tasks import Answers, Task
from tsqlora.tasks.forward import (
    Collate,
    base_model,
    model_logits,
    output_part,
    precision,
    require_usable,
    split_labels,
)
from tsqlora.tasks.generation import IGNORED, Generation
from tsqlora.tasks.preference import Preference

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
    """Results of the pass for every row, in the data set's order."""

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
) -> tuple[Forward | None, Head | None]:
    """Run the pass; return its results in the first process, and the head in all.

    `collate` must give each sample a row. With `mean` the rows' mean hidden states are recorded, too. Raises DataError
    for a label that the loss cannot use; `kind` says which rows they are.
    """
    rows = rows or RowNames()
    with eval_mode(model):  # rows may draw random numbers, as augmentation does
        lengths = distributed.together(lambda: lengths_of(dataset) if rows.lengths is None else rows.lengths)
    batches = sorted_batches([int(n) for n in lengths], compute.batch_size)
    exact = precision(next(model.parameters()).device, compute.autocast, cache=False)
    with eval_mode(model), torch.no_grad(), without_zero_updates(model), exact:

        def find(size: int) -> Head | None:
            batch = collate([dataset[int(j)] for j in batches[0][:size]])
            if not isinstance(task, Answers):
                return None
            inputs, _ = split_labels(batch, model)
            return find_head(model, lambda: model_logits(model, inputs, task))

        # If one process cannot read its rows, all raise the error.
        head = distributed.together(lambda: retry_on_oom(find, halves(len(batches[0]))))
        journal = None
        if compute.journal is not None:
            settings = {"pass": "forward", "batch size": compute.batch_size, "task": repr(task)}
            settings |= {"autocast": str(compute.autocast), "mean": mean}
            journal = Journal(compute.journal / "forward", identity_of(model, rows.hashes or (), lengths, [], settings))

        def measure(indices: np.ndarray) -> Columns:
            batch = collate([dataset[int(j)] for j in indices])
            inputs, labels = split_labels(batch, model)
            names = indices if rows.ids is None else np.asarray(rows.ids)[indices]
            usable = partial(require_usable, task, labels=labels, rows=names, kind=kind)
            columns = _columns(model, inputs, labels, task, head, usable, mean=mean)
            return {name: (x.float() if x.is_floating_point() else x).numpy(force=True) for name, x in columns.items()}

        columns = run_batches(measure, batches, len(dataset), phase="look", journal=journal, progress=compute.progress)
    return (Forward(**columns) if distributed.is_first() else None), head


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
    middle = isinstance(task, Generation)
    with recorded(layers) as calls, hidden_states(model if mean else None, middle=middle) as states:
        logits = model_logits(model, inputs, task)
    usable(logits)
    loss = sample_losses(task, logits, labels)
    if not isinstance(task, Answers | Preference):
        targets = task.targets(labels) if isinstance(task, Generation) else labels
        columns = {"labels": targets.ne(IGNORED).sum(1), "loss": loss}
        state = mean_state(states, labels.ne(IGNORED)) if middle else None
        # Half precision, in which large columns are kept, ends at 65,504.
        return columns if state is None else {**columns, "mean": state.clamp(-6e4, 6e4)}
    columns = {"labels": labels, "loss": loss, "logits": logits}
    if head is not None:
        columns["features"] = features_of(calls, head.linear, logits)
        if head.dense is not None:
            columns["dense"] = calls[head.dense][0]
    if (state := mean_state(states, inputs.get("attention_mask"))) is not None:
        columns["mean"] = state
    return columns


def find_head(model: nn.Module, forward: Callable[[], Float[Tensor, "n *k"]]) -> Head | None:
    """Return the trainable linear layer whose output is the model's logits; None where there is none.

    `forward` returns one batch's logits in evaluation mode. In a decoder, whose head runs at every token, the logits
    are one row of the layer's output.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    }
    with torch.no_grad(), recorded(linears.values()) as calls:
        logits = forward()
    for name, linear in linears.items():
        if linear not in calls or linear.out_features != logits.shape[-1]:
            continue
        output = calls[linear][1]
        if output.dim() == 3 and logits.dim() == 2 and len(output) == len(logits):
            output = output[torch.arange(len(output), device=output.device), _position(output, logits)]
        if output.shape == logits.shape and torch.allclose(output.to(logits), logits, atol=1e-5):
            per_token = logits.dim() == 3
            return Head(name, linear) if per_token else Head(name, linear, *_dense_before(calls, linear, logits))
    return None


@contextmanager
def recorded(modules: Iterable[nn.Module]) -> Generator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Record input and output of each module's last call while open."""
    calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] = (args[0].detach(), output.detach())

    hooks = [module.register_forward_hook(record) for module in modules]
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

    body = inner.base_model
    hook = (_middle_block(body) if middle else body).register_forward_hook(record)
    try:
        yield states
    finally:
        hook.remove()


def _middle_block(body: nn.Module) -> nn.Module:
    """The block halfway up the decoder, or up the only stack; the body itself if it has no blocks."""
    stack = getattr(body, "decoder", body)
    blocks = transformer_blocks(stack, [name for name, _ in stack.named_parameters()])
    return stack.get_submodule(blocks[(len(blocks) - 1) // 2]) if blocks else body


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


def features_of(calls: Calls, linear: nn.Module, logits: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
    """Return the layer's input at the position of the logits, one row per sample."""
    x, output = calls[linear]
    return x if x.dim() == 2 else x[torch.arange(len(x), device=x.device), _position(output, logits)]


def _position(output: Float[Tensor, "n t k"], logits: Float[Tensor, "n k"]) -> Tensor:
    """Return the last token at which a sample's outputs are its logits."""
    distance = (output.to(logits) - logits[:, None]).abs().sum(dim=-1)
    nearest = distance <= distance.min(dim=1, keepdim=True).values
    places = torch.arange(output.shape[1], device=output.device)
    return torch.where(nearest, places, -1).max(dim=1).values


def _dense_before(calls: Calls, linear: nn.Linear, logits: Float[Tensor, "n k"]) -> tuple[nn.Linear | None, str]:
    features = features_of(calls, linear, logits)
    for module, (x, output) in calls.items():
        if module is linear or not isinstance(module, nn.Linear) or x.dim() != 2 or output.shape != features.shape:
            continue
        for name, activation in ACTIVATIONS.items():
            if torch.allclose(activation(output).to(features), features, atol=1e-5):
                return module, name
    return None, "identity"
