"""Adapters in the top blocks only: the backward pass ends below them."""

from collections.abc import Sequence

from torch import nn

from tsqlora.errors import SettingsError


def top_layers(model: nn.Module, layers: Sequence[str], depth: int) -> list[str]:
    """Those of the layers that lie in the top `depth` transformer blocks or above them, by the order of registration.

    Raises SettingsError where the model has fewer blocks, or none of the layers lies that high.

    >>> model = nn.Sequential(nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3)), nn.Linear(2, 2))
    >>> top_layers(model, ["0.0.0", "0.1.0", "0.2.0", "1"], 2)
    ['0.1.0', '0.2.0', '1']
    """
    blocks = transformer_blocks(model, layers)
    if not blocks:
        raise SettingsError(
            f"ranks.depth is {depth}, and the model has no transformer blocks (an nn.ModuleList of layers to adapt); "
            "set it to all, or in tsqlora.wrap leave depth out"
        )
    if not 1 <= depth <= len(blocks):
        raise SettingsError(
            f"ranks.depth is {depth}, and the model has {len(blocks)} transformer blocks; set it to 1 to {len(blocks)}"
        )
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    top = [layer for layer in layers if order[layer] >= order[blocks[-depth]]]
    if not top:
        raise SettingsError(
            f"ranks.depth is {depth}, and no layer of adapter.target_modules lies in the top {depth} of "
            f"{len(blocks)} blocks; raise it, or adapt other layers"
        )
    return top


def transformer_blocks(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """The entries of the outermost ModuleLists that hold some of the layers: an encoder's before a decoder's."""
    lists: list[str] = []
    blocks: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in lists):
            continue
        if any(layer.startswith(f"{name}.") for layer in layers):
            lists.append(name)
            blocks += [f"{name}.{entry}" for entry in range(len(module))]
    return blocks
