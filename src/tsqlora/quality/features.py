"""What a task's last linear layer is given: the features on which a head is fitted.  METHOD 1.1."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tsqlora.tasks.forward import base_model, output_part

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "identity": lambda x: x,
}
"""Between a head's dense layer and its last one, in the heads of transformers."""

Seen = Mapping[nn.Module, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The last linear layer of a task, and the layer before it where that trains whole, too."""

    name: str
    linear: nn.Linear
    dense: nn.Linear | None = None
    """Its output, through the activation, is what `linear` is given."""
    activation: str = "identity"


def find_head(model: nn.Module, forward: Callable[[], Float[Tensor, "n k"]]) -> Head | None:
    """The trainable linear layer whose output is the model's logits; None where there is none.

    `forward` gives one batch's logits, of the model in evaluation mode. Of a decoder, whose layer answers at every
    token, the logits are a row of its output.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    }
    with torch.no_grad(), recorded(linears.values()) as seen:
        logits = forward()
    for name, linear in linears.items():
        if linear not in seen or linear.out_features != logits.shape[-1]:
            continue
        if _is_output(seen[linear][1], logits):
            return Head(name, linear, *_dense_before(seen, linear, logits))
    return None


@contextmanager
def recorded(modules: Iterable[nn.Module]) -> Generator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Input and output of each module's last call, while open."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[module] = (args[0].detach(), output.detach())

    hooks = [module.register_forward_hook(record) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def hidden_states(model: nn.Module | None) -> Generator[list[Tensor]]:
    """While open, a list of the last hidden states of a transformers model's body, call by call; empty of another."""
    inner = None if model is None else base_model(model)
    states: list[Tensor] = []
    if not isinstance(inner, PreTrainedModel):
        yield states
        return

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        if (state := output_part(output, "last_hidden_state")) is not None:
            states.append(state.detach())

    hook = inner.base_model.register_forward_hook(record)
    try:
        yield states
    finally:
        hook.remove()


def mean_state(states: Sequence[Float[Tensor, "n t h"]], mask: Tensor | None) -> Float[Tensor, "n h"] | None:
    """The mean of the last of these over the tokens that are not padding; None where they are not of tokens."""
    if not states or states[-1].dim() != 3:
        return None
    state = states[-1].float()
    if mask is None:
        return state.mean(dim=1)
    if mask.shape != state.shape[:2]:
        return None
    weights = mask.to(state)[..., None]
    return (state * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)


def features_of(seen: Seen, linear: nn.Module, logits: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
    """What the layer was given where it made the logits, one row a sample."""
    given, output = seen[linear]
    if given.dim() == 2:
        return given
    return given[torch.arange(len(given), device=given.device), _position(output, logits)]


def _is_output(output: Tensor, logits: Float[Tensor, "n k"]) -> bool:
    if output.dim() == 3 and len(output) == len(logits):
        output = output[torch.arange(len(output), device=output.device), _position(output, logits)]
    return output.shape == logits.shape and torch.allclose(output.to(logits), logits, atol=1e-5)


def _position(output: Float[Tensor, "n t k"], logits: Float[Tensor, "n k"]) -> Tensor:
    """The last token at which a sample's outputs are its logits."""
    distance = (output.to(logits) - logits[:, None]).abs().sum(dim=-1)
    nearest = distance <= distance.min(dim=1, keepdim=True).values
    places = torch.arange(output.shape[1], device=output.device)
    return torch.where(nearest, places, -1).max(dim=1).values


def _dense_before(seen: Seen, linear: nn.Linear, logits: Float[Tensor, "n k"]) -> tuple[nn.Linear | None, str]:
    features = features_of(seen, linear, logits)
    for module, (given, output) in seen.items():
        if module is linear or not isinstance(module, nn.Linear) or given.dim() != 2 or output.shape != features.shape:
            continue
        for name, activation in ACTIVATIONS.items():
            if torch.allclose(activation(output).to(features), features, atol=1e-5):
                return module, name
    return None, "identity"
