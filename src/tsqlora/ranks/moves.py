"""Moves of rank from layer to layer at one adjustment, towards the targets of docs/method.md eq. 7."""

from collections import Counter
from collections.abc import Mapping

from tsqlora.errors import SettingsError, nearest
from tsqlora.ranks.budget import Shapes, costs, fill, used

LEFT_ALONE = 1
"""A layer this close to its target neither gives nor receives in a move."""

POLICIES = ("fixed", "tsqlora")
"""Whether ranks stay, or move towards their targets."""


def require_policy(policy: str) -> None:
    """Raises SettingsError for an unknown policy."""
    if policy not in POLICIES:
        raise SettingsError(f"ranks.policy '{policy}' is unknown; {nearest(str(policy), POLICIES)}")


def moved_towards(
    target: Mapping[str, int],
    ranks: Mapping[str, int],
    *,
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
    and the next layer below target is tried. No donor falls below `min_rank` or gives more than
    its `droppable`, the slots that are old enough; no layer rises above its entry of `caps`.
    What is then left unspent of the `budget` is handed out by `fill`.

    Repeated with the same target it stops changing: every move shrinks what layers lack, and
    nothing ever takes from a layer that is not above its target.
    """
    now, cost = dict(ranks), costs(shapes)
    spare = {n: min(droppable[n], now[n] - min(min_rank, caps[n])) for n in now}
    unpayable: set[str] = set()
    while True:
        lack = {n: target[n] - now[n] for n in sorted(now) if n not in unpayable and now[n] < caps[n]}
        receiver = max(lack, key=lack.__getitem__, default=None)
        if receiver is None or lack[receiver] <= LEFT_ALONE:
            break
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
