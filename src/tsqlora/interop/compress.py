"""Ranks for a trained adapter: how many directions each layer keeps when all together may have so many parameters."""

from collections.abc import Mapping

from tsqlora.errors import SettingsError
from tsqlora.interop.lora import LoraAdapter
from tsqlora.interop.rewrite import decompose


def ranks_for(
    adapter: LoraAdapter, mean_rank: float, *, curvature: Mapping[str, float] | None = None
) -> dict[str, int]:
    """The ranks with which least of the update is lost at the parameters of a uniform LoRA of `mean_rank`.

    A direction of layer l is worth the square of its singular value, (s_l·σ)², and costs as many
    parameters as l has inputs and outputs: the dearest by worth per parameter are kept, as long as
    they fit. Greedy, which is within one direction of the best there is. Ties go by name.

    Args:
        curvature: what a unit of change in a weight costs each layer, such as the mean Fisher
            information of its weights: it multiplies the worth. Without it all layers are alike.

    Raises SettingsError for a mean rank that is not positive, or leaves nothing.
    """
    if not mean_rank > 0:
        raise SettingsError(f"--mean-rank {mean_rank:g}: it must be above 0")
    costs = {name: target.inputs + target.outputs for name, target in adapter.targets.items()}
    left = mean_rank * sum(costs.values())
    worth = []
    for name, target in adapter.targets.items():
        _, singular, _ = decompose(target)
        weight = target.scale**2 * (1.0 if curvature is None else curvature[name])
        worth += [(-weight * float(value) ** 2 / costs[name], name) for value in singular if value > 0]
    ranks = dict.fromkeys(adapter.targets, 0)
    for _, name in sorted(worth):
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    if not any(ranks.values()):
        raise SettingsError(f"--mean-rank {mean_rank:g} leaves every layer at rank 0; raise it")
    return ranks
