"""Near-duplicates with different labels, and the label of the nearest row, by cosine of centred features."""

from itertools import combinations_with_replacement

import numpy as np

from tsqlora.auditing.labels.label_noise import Labels
from tsqlora.libs.shapes import Float, Int

NEAR = 0.93
"""Cosine of centred features above which rows are near-duplicates: on CLINC150's mean hidden states such pairs say
(nearly) the same."""
MOST_PRODUCTS = 4e12
"""Compare as many rows as these multiplications allow, some minutes on two cores: 100,000 rows of 768 numbers."""
MOST_CONTRADICTIONS = 100_000
"""The nearest pairs that are returned: more are those of very many copies of one text."""
ROWS_AT_ONCE = 1_024


def contradictions(
    features: Float[np.ndarray, "n d"], labels: Labels, ids: Int[np.ndarray, " n"]
) -> tuple[tuple[tuple[int, int], ...], int]:
    """Return the nearest pairs with different labels, by their ids, and how many rows were not compared.  [ours]

    Of more rows than MOST_PRODUCTS allows, evenly spaced ones are compared. Cost: n²·d/2 multiplications.
    """
    some = np.linspace(0, len(ids) - 1, min(len(ids), int((2 * MOST_PRODUCTS / features.shape[1]) ** 0.5))).astype(int)
    unit, labels, least = _unit(features[some]), labels[some], NEAR
    similarity, pairs = np.empty(0, np.float32), np.empty((2, 0), np.int64)
    for a, b in combinations_with_replacement(range(0, len(some), ROWS_AT_ONCE), 2):
        first, second = slice(a, a + ROWS_AT_ONCE), slice(b, b + ROWS_AT_ONCE)
        similar = unit[first] @ unit[second].T
        near = (similar >= least) & (labels[first, None] != labels[second])
        near = np.triu(near, 1) if a == b else near
        similarity = np.concatenate([similarity, similar[near]])
        pairs = np.concatenate([pairs, np.array([[a], [b]]) + np.nonzero(near)], axis=1)
        if len(similarity) > MOST_CONTRADICTIONS:
            nearest = np.argpartition(-similarity, MOST_CONTRADICTIONS)[:MOST_CONTRADICTIONS]
            similarity, pairs = similarity[nearest], pairs[:, nearest]
            least = np.nextafter(similarity.min(), np.float32(2))  # nearer ones alone can replace these
    first, second = ids[some[pairs[:, np.lexsort((*pairs[::-1], -similarity))]]].tolist()
    return tuple(zip(first, second, strict=True)), len(ids) - len(some)


def _unit(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Return centred features of norm 1."""
    centred = features.astype(np.float32)
    centred -= centred.mean(axis=0)
    centred /= np.sqrt(np.einsum("nd,nd->n", centred, centred)).clip(min=1e-12)[:, None]
    return centred


def labels_of_nearest(
    features: Float[np.ndarray, "n d"], labels: Labels, rows: Int[np.ndarray, " n"], some: Int[np.ndarray, " m"]
) -> Int[np.ndarray, " m"]:
    """Return the label that is nearest to each of some labels, by cosine of centred features, in another row."""
    unit, nearest = _unit(features), list[np.ndarray]()
    for start in range(0, len(some), 256):
        part = some[start : start + 256]
        similar = unit[part] @ unit.T
        similar[rows[part][:, None] == rows] = -np.inf
        nearest.append(similar.argmax(axis=1))
    return labels[np.concatenate(nearest)]
