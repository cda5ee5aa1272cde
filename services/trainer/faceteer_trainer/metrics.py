"""How well a score tells two groups apart."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]


def average_ranks(scores: Floats) -> npt.NDArray[np.float64]:
    """Ranks 1..m of scores [m]; ties share the mean of their ranks."""
    order = np.argsort(scores, kind="stable")
    ranks = np.empty(len(scores), np.float64)
    ranks[order] = np.arange(1, len(scores) + 1)
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    sums = np.bincount(inverse, weights=ranks)
    return (sums / counts)[inverse]


def auc(scores: Floats, positive: npt.NDArray[np.bool_]) -> float:
    """Area under the ROC curve: how often a positive scores above a negative; ties count half (Mann and Whitney)."""
    hits = int(positive.sum())
    misses = len(positive) - hits
    if hits == 0 or misses == 0:
        return 0.5
    return float((average_ranks(scores)[positive].sum() - hits * (hits + 1) / 2) / (hits * misses))
