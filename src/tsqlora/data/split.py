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
    if not 0 < fraction < 1:
        raise SettingsError(f"validation fraction {fraction} is not between 0 and 1; set a share such as 0.1")
    groups = _groups(rows, label)
    # A class that left training altogether would be unknown to the model that is validated.
    most = [len(group) - 1 for group in groups]
    if sum(most) < 1:
        raise DataError(f"{rows.source} has too few rows to split off a validation set; name one in data.validation")
    rng = np.random.default_rng(seed)
    held_out = set()
    for group, count in zip(groups, _quotas([len(group) for group in groups], most, fraction), strict=True):
        held_out.update(rng.permutation(group)[:count].tolist())
    indices = range(len(rows))
    train, validation = [i for i in indices if i not in held_out], [i for i in indices if i in held_out]
    return _take(rows, train), _take(rows, validation)


def _groups(rows: Rows, label: str | None) -> list[list[int]]:
    """Row indices by label, in order of first appearance; one group without a label."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows.rows):
        # By spelling: a label that cannot be hashed is refused later, with its row.
        groups.setdefault("" if label is None else repr(row.get(label)), []).append(i)
    return list(groups.values())


def _quotas(sizes: Sequence[int], most: Sequence[int], fraction: float) -> list[int]:
    """Rows that each group gives: floors of the shares, the rest by largest remainder."""
    shares = [size * fraction for size in sizes]
    quotas = [min(math.floor(share), limit) for share, limit in zip(shares, most, strict=True)]
    total = min(max(1, round(sum(shares))), sum(most))
    while sum(quotas) < total:
        open_groups = [j for j in range(len(sizes)) if quotas[j] < most[j]]
        quotas[max(open_groups, key=lambda j: shares[j] - quotas[j])] += 1
    return quotas


def _take(rows: Rows, indices: Sequence[int]) -> Rows:
    return replace(
        rows,
        rows=tuple(rows.rows[i] for i in indices),
        numbers=tuple(rows.numbers[i] for i in indices),
    )
