"""The contract with torch: a failure here says which of its interfaces has changed."""

import copy

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from tsqlora.libs.accelerate import is_compiled
from tsqlora.libs.torch import (
    compile_limits,
    inside_compiled,
    is_view,
    remove_state_dict_hooks,
    show_directly,
    with_weight,
)


def test_a_view_is_told_from_a_tensor_of_its_own() -> None:
    x = torch.zeros(4, requires_grad=True) * 1
    assert is_view(x[:2])
    assert not is_view(x)
    assert not is_view(x[:2].clone())


def test_a_twin_has_another_weight_and_no_hooks() -> None:
    """`nn.Module._parameters` and `forward` are all that a layer's output depends on."""
    norm = nn.LayerNorm(3)
    norm.register_forward_hook(lambda *_: 1 / 0)
    x = torch.randn(2, 3)
    twin = with_weight(norm, torch.zeros(3))
    assert torch.equal(twin.forward(x), torch.zeros(2, 3))
    assert torch.equal(norm.forward(x), nn.LayerNorm(3)(x))


def test_the_module_inside_a_compiled_one_is_found() -> None:
    """`_orig_mod` holds it."""
    module = nn.Linear(2, 2)
    compiled = torch.compile(module, backend="eager")
    assert is_compiled(compiled)
    assert not is_compiled(module)
    assert inside_compiled(compiled) is module


NAMES = [(f"{part}recompile_limit", f"{part}cache_size_limit") for part in ("", "accumulated_")]
"""Of torch's limits, since 2.7 and before."""


def test_compilation_has_limits_that_can_be_raised() -> None:
    """`torch._dynamo.config` has both by one of these names, and `patch` puts them back."""
    import torch._dynamo.config as dynamo

    def limits() -> list[int]:
        return [getattr(dynamo, n, None) or getattr(dynamo, o) for n, o in NAMES]

    before = limits()
    with compile_limits(3):
        assert limits() == [3 * limit for limit in before]
    assert limits() == before


def test_state_dict_hooks_are_removed_from_a_copy_too() -> None:
    """A module keeps them in `_state_dict_hooks` and `_load_state_dict_pre_hooks`, wrapped as `.hook`."""
    calls = []

    def saved(*_: object) -> None:
        calls.append("saved")

    def loaded(*_: object) -> None:
        calls.append("loaded")

    module = nn.Linear(2, 2)
    module.register_state_dict_post_hook(saved)
    module.register_load_state_dict_pre_hook(loaded)
    twin = copy.deepcopy(module)
    twin.load_state_dict(twin.state_dict())
    assert calls == ["saved", "loaded"]
    remove_state_dict_hooks(twin, saved, loaded)
    twin.load_state_dict(twin.state_dict())
    assert calls == ["saved", "loaded"]


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_a_parametrised_tensor_can_be_read_without_calls_of_modules() -> None:
    """torch makes a class for the module, with the tensor as a property."""
    module = nn.Linear(2, 2)
    register_parametrization(module, "weight", Double())
    show_directly(type(module), "weight")
    twice = 2 * module.parametrizations.weight.original
    module.parametrizations.weight[0].register_forward_hook(lambda *_: 1 / 0)
    assert torch.equal(module.weight, twice)
    another = nn.Linear(2, 2)
    register_parametrization(another, "weight", Double())
    show_directly(type(another), "weight")
    register_parametrization(another, "weight", Double())
    assert torch.equal(another.weight, 4 * another.parametrizations.weight.original)
