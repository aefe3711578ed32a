"""A seeded validation split."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tsqlora.data.rows import Rows
from tsqlora.errors import DataError, SettingsError


def split_rows(rows: Rows, *, fraction: float, seed: int, label: str | None) -> tuple[Rows, Rows]:
    """Training rows and validation rows: a random `fraction` of the rows is for validation.

    With `label`, each class gives its share, by largest remainder, and keeps at least one row
    for training. Both sides have at least one row, in the order of the file; the same rows and
    seed give the same split. Raises SettingsError for a fraction outside (0, 1), DataError
    where the rows are too few.
    """
    out = held_out(_groups(rows, label), fraction=fraction, seed=seed, source=rows.source)
    return take(rows, np.flatnonzero(~out)), take(rows, np.flatnonzero(out))


def held_out(groups: np.ndarray, *, fraction: float, seed: int, source: str) -> np.ndarray:
    """Whether each row is for validation; `groups` numbers its class, in order of first appearance.

    As `split_rows`, for rows of which only the classes are in memory.
    """
    if not 0 < fraction < 1:
        raise SettingsError(f"validation fraction {fraction} is not between 0 and 1; set a share such as 0.1")
    sizes = np.bincount(groups).tolist()
    # A class that left training altogether would be unknown to the model that is validated.
    most = [size - 1 for size in sizes]
    if sum(most) < 1:
        raise DataError(f"{source} has too few rows to split off a validation set; name one in data.validation")
    rng = np.random.default_rng(seed)
    out = np.zeros(len(groups), dtype=np.bool_)
    for group, count in enumerate(_quotas(sizes, most, fraction)):
        out[rng.permutation(np.flatnonzero(groups == group))[:count]] = True
    return out


def take(rows: Rows, indices: np.ndarray) -> Rows:
    """Some of the rows, each with its number and place."""
    return replace(
        rows,
        rows=tuple(rows.rows[i] for i in indices),
        numbers=tuple(rows.numbers[i] for i in indices),
        places=rows.ids[indices],
    )


def _groups(rows: Rows, label: str | None) -> np.ndarray:
    """The number of each row's label, by first appearance; 0 without a label."""
    numbers: dict[str, int] = {}
    # By spelling: a label that cannot be hashed is refused later, with its row.
    spelled = ("" if label is None else repr(row.get(label)) for row in rows.rows)
    return np.array([numbers.setdefault(name, len(numbers)) for name in spelled])


def _quotas(sizes: Sequence[int], most: Sequence[int], fraction: float) -> list[int]:
    """Rows that each group gives: floors of the shares, the rest by largest remainder."""
    shares = [size * fraction for size in sizes]
    quotas = [min(math.floor(share), limit) for share, limit in zip(shares, most, strict=True)]
    total = min(max(1, round(sum(shares))), sum(most))
    while sum(quotas) < total:
        open_groups = [j for j in range(len(sizes)) if quotas[j] < most[j]]
        quotas[max(open_groups, key=lambda j: shares[j] - quotas[j])] += 1
    return quotas
