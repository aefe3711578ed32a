"""How ranks move towards their targets at one adjustment; a table of the ways.

A policy is a function and an entry in `POLICIES`; a callable may be passed in place of a name.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from numbers import Integral
from typing import Any, Protocol, cast, runtime_checkable

from tsqlora.errors import SettingsError, nearest
from tsqlora.ranks.budget import Shapes, costs, fill, used

LEFT_ALONE = 1
"""A layer this close to its target neither gives nor receives in a move: METHOD 4.3."""


@runtime_checkable
class Policy(Protocol):
    """The next ranks, from the present ones and what is known at an adjustment.

    `target` are the ranks of METHOD eq. 7, `droppable` how many slots of each layer are old
    enough to be given up now, `caps` the highest rank of each layer, `budget` the parameters
    there are, `moves` how many slots may be given up now. Given ranks within the budget, it
    returns ranks within the budget, for the same layers, each from min(`min_rank`, cap) to its
    cap, and takes no more than `droppable`: `require_bounds` holds it to all of these. `moves`
    is its own to keep.
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


def fixed(
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
    """The ranks as they are: those that the model was made with hold for the whole run."""
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
    more than `droppable`. What is then left unspent is handed out by `fill`. METHOD 4.3.

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
    return fill(now, wanted=target, order=sorted(now), shapes=shapes, caps=caps, budget=budget)


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
    given: Counter[str] = Counter()
    while price > 0:
        excess = {n: ranks[n] - given[n] - target[n] for n in sorted(ranks) if spare[n] > given[n]}
        donor = max(excess, key=excess.__getitem__, default=None)
        if donor is None or excess[donor] <= LEFT_ALONE or given.total() >= moves:
            return None
        given[donor] += 1
        price -= costs[donor]
    return given


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
    """What the policy gave for these ranks, in their order, if it keeps to all that a Policy promises.

    A layer that is outside of its bounds already may stay there, but not go further.

    Raises SettingsError that names the policy, the layer, what it was given and the bound.
    """
    told = f"ranks.policy {getattr(policy, '__name__', type(policy).__name__)} gave"
    if not isinstance(answer, Mapping):
        raise SettingsError(f"{told} {answer!r}; it must return a dict with the rank of every layer")
    given = cast(Mapping[Any, Any], answer)
    for layer in sorted(given.keys() ^ ranks.keys(), key=str):
        if layer in ranks:
            raise SettingsError(f"{told} layer '{layer}' no rank; give every layer in ranks one")
        raise SettingsError(f"{told} a rank to layer '{layer}', which is unknown; give ranks to the layers in ranks")
    for layer, now in ranks.items():
        _require_rank(
            given[layer],
            now,
            told=f"{told} layer '{layer}' rank {given[layer]}",
            least=min(min_rank, caps[layer]),
            cap=caps[layer],
            droppable=droppable[layer],
        )
    checked = {layer: int(given[layer]) for layer in ranks}
    if (cost := used(checked, shapes)) > budget:
        raise SettingsError(
            f"{told} ranks that cost {cost:,} parameters, and the budget is {budget:,}; give up slots of other layers "
            "for those that grow: a rank costs inputs + outputs, as shapes has them"
        )
    return checked


def _require_rank(rank: Any, now: int, *, told: str, least: int, cap: int, droppable: int) -> None:
    if not isinstance(rank, Integral):
        raise SettingsError(f"{told}; give a whole number, an int")
    number = int(rank)
    if number > max(cap, now):
        raise SettingsError(f"{told}, and its cap is {cap}; give at most caps[layer]")
    if number < min(least, now):
        raise SettingsError(f"{told}, and its least is {least}; give at least min(min_rank, caps[layer])")
    if now - number > droppable:
        raise SettingsError(
            f"{told} in place of {now}, and {droppable} of its slots may be given up now, the others are too young; "
            "take at most droppable[layer]"
        )


POLICIES: dict[str, Policy] = {"fixed": fixed, "tsqlora": tsqlora}


def get_policy(policy: str | Policy) -> Policy:
    """The policy of that name, or the callable itself; SettingsError for an unknown name."""
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise SettingsError(f"ranks.policy '{policy}' is unknown; {nearest(policy, POLICIES)}")
    return POLICIES[policy]
