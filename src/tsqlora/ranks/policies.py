"""Policies: functions that move ranks towards their targets at one adjustment.

A policy is a function and an entry in `POLICIES`; a callable may be passed in place of a name.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from numbers import Integral
from typing import Any, Protocol, cast, runtime_checkable

from tsqlora.errors import SettingsError, nearest
from tsqlora.ranks.budget import Shapes, costs, fill, used

LEFT_ALONE = 1
"""A layer this close to its target neither gives nor receives in a move."""


@runtime_checkable
class Policy(Protocol):
    """The next ranks, from the present ones and the measurements of an adjustment.

    `target` are the ranks of docs/method.md eq. 7, `droppable` how many slots of each layer are old
    enough to be given up now, `caps` the highest rank of each layer, `budget` the parameters
    there are, `moves` how many slots may be given up now. Given ranks within the budget, it
    returns ranks within the budget, for the same layers, each from min(`min_rank`, cap) to its
    cap, and takes no more than `droppable`: `require_bounds` holds it to all of these. The policy
    itself must respect `moves`.
    """

    def __call__(
        self,
        ranks: Mapping[str, int],
        *,
        target: Mapping[str, int],
        droppable: Mapping[str, int],
        shapes: Shapes,
        caps: Mapping[str, int],
        budget: int,
        moves: int,
        min_rank: int,
    ) -> dict[str, int]: ...


def fixed(ranks: Mapping[str, int], **measurements: Any) -> dict[str, int]:
    """Keep the model's first ranks for the whole run."""
    return dict(ranks)


def tsqlora(
    ranks: Mapping[str, int],
    *,
    target: Mapping[str, int],
    droppable: Mapping[str, int],
    shapes: Shapes,
    caps: Mapping[str, int],
    budget: int,
    moves: int,
    min_rank: int,
) -> dict[str, int]:
    """The ranks after at most `moves` slots went from layers above target to layers below it.

    A move gives one rank to the layer furthest below its target and is paid for by the layers
    furthest above theirs; ties go by name. It is made if it can be paid in full, else not at all,
    and the next layer below target is tried. No donor falls below `min_rank` or gives
    more than `droppable`. What is then left unspent is handed out by `fill`.

    Repeated with the same target it stops changing: every move shrinks what layers lack, and
    nothing ever takes from a layer that is not above its target.
    """
    now, cost = dict(ranks), costs(shapes)
    spare = {n: min(droppable[n], now[n] - min(min_rank, caps[n])) for n in now}
    unpayable: set[str] = set()
    while receiver := _furthest_below(now, target=target, caps=caps, skip=unpayable):
        price = cost[receiver] - (budget - used(now, shapes))
        paid = _payment(price, ranks=now, target=target, spare=spare, costs=cost, moves=moves)
        if paid is None:
            unpayable.add(receiver)
            continue
        now[receiver] += 1
        moves -= paid.total()
        for donor, slots in paid.items():
            now[donor] -= slots
            spare[donor] -= slots
    return fill(now, wishes=target, order=sorted(now), shapes=shapes, caps=caps, budget=budget)


def _furthest_below(
    ranks: Mapping[str, int], *, target: Mapping[str, int], caps: Mapping[str, int], skip: Collection[str]
) -> str | None:
    """The layer that a move should give to, None if there is none."""
    lack = {n: target[n] - ranks[n] for n in sorted(ranks) if n not in skip and ranks[n] < caps[n]}
    layer = max(lack, key=lack.__getitem__, default=None)
    return layer if layer is not None and lack[layer] > LEFT_ALONE else None


def _payment(
    price: int,
    *,
    ranks: Mapping[str, int],
    target: Mapping[str, int],
    spare: Mapping[str, int],
    costs: Mapping[str, int],
    moves: int,
) -> Counter[str] | None:
    """Slots that each donor gives up so that `price` parameters come free, None if they cannot."""
    payment: Counter[str] = Counter()
    while price > 0:
        excess = {n: ranks[n] - payment[n] - target[n] for n in sorted(ranks) if spare[n] > payment[n]}
        donor = max(excess, key=excess.__getitem__, default=None)
        if donor is None or excess[donor] <= LEFT_ALONE or payment.total() >= moves:
            return None
        payment[donor] += 1
        price -= costs[donor]
    return payment


def require_bounds(
    answer: Any,
    ranks: Mapping[str, int],
    *,
    policy: Policy,
    droppable: Mapping[str, int],
    shapes: Shapes,
    caps: Mapping[str, int],
    budget: int,
    min_rank: int,
) -> dict[str, int]:
    """Return the policy's ranks, in their order, if they keep all of Policy's bounds.

    A layer that is outside its bounds already may stay there, but not go further. Raises SettingsError that names the
    policy, and the layer with its rank and bounds.
    """
    prefix = f"ranks.policy {getattr(policy, '__name__', type(policy).__name__)} gave"
    if not isinstance(answer, Mapping):
        raise SettingsError(f"{prefix} {answer!r}; it must return a dict with the rank of every layer")
    chosen = cast(Mapping[Any, Any], answer)
    for layer in sorted(chosen.keys() ^ ranks.keys(), key=str):
        gave = "no rank" if layer in ranks else "a rank, and there is no such layer"
        raise SettingsError(f"{prefix} '{layer}' {gave}; give every layer in ranks one, and no other")
    for layer, now in ranks.items():
        least = max(min(min_rank, caps[layer], now), now - droppable[layer])
        most = max(caps[layer], now)
        if not (isinstance(chosen[layer], Integral) and least <= chosen[layer] <= most):
            raise SettingsError(
                f"{prefix} layer '{layer}' rank {chosen[layer]}; give a whole number from {least} to {most}: at least "
                f"min_rank, at most caps[layer], and at most droppable[layer] = {droppable[layer]} below its {now}"
            )
    checked = {layer: int(chosen[layer]) for layer in ranks}
    if (cost := used(checked, shapes)) > budget:
        raise SettingsError(
            f"{prefix} ranks that cost {cost:,} parameters, and the budget is {budget:,}; drop slots of other layers "
            "for those that grow: a rank costs inputs + outputs, as shapes has them"
        )
    return checked


POLICIES: dict[str, Policy] = {"fixed": fixed, "tsqlora": tsqlora}


def get_policy(policy: str | Policy) -> Policy:
    """The policy of that name, or the callable itself; SettingsError for an unknown name."""
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise SettingsError(f"ranks.policy '{policy}' is unknown; {nearest(policy, POLICIES)}")
    return POLICIES[policy]
