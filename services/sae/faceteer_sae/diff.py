"""The smallest set of edits that carries a given share of the difference between two embeddings."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from faceteer_runtime.errors import InvalidField

from faceteer_sae.edits import Operation
from faceteer_sae.model import FeatureActivations, SparseAutoencoder
from faceteer_sae.rivals import RULE
from faceteer_sae.statistics import FeatureStatistics

DEFAULT_COVERAGE = 0.9
# Of a difference that another picture is to have. With three values changed at once, 0.9 leaves one of them behind in
# every sixth picture of the example world, 0.98 in every thirtieth.
CARRIED_COVERAGE = 0.98
# Features that are weighed against each other: their Gram matrix takes this squared times 4 bytes (16 MB).
_CONTENDERS = 2048
# A float32 sum of squares is no better than this.
_TINY = 1e-6


class FeatureDiff(NamedTuple):
    """Edits, in RAW units, that carry a share of ``D = sum (f_i(target) - f_i(source)) d_i``.

    Attributes:
        indices: int64 [k], largest contribution ``c_i . D`` first, c_i being ``(f_i(target) - f_i(source)) d_i``.
        operations: int64 [k], of :class:`Operation`: all ADD, until :func:`for_another` says otherwise.
        values: float32 [k], ``f_i(target) - f_i(source)`` for ADD.
        shares: float32 [k], ``c_i . D / ||D||^2``: over all features that differ they add up to 1.
        coverage: the share carried, ``1 - ||D - sum c_i||^2 / ||D||^2``; 1 where there is no difference.
        differing: how many features differ at all.
        unexplained: ``||(target - source) - D||^2 / ||target - source||^2``; 0 where there is no difference.
    """

    indices: np.ndarray
    operations: np.ndarray
    values: np.ndarray
    shares: np.ndarray
    coverage: float
    differing: int
    unexplained: float


def check_coverage(coverage: float, default: float = DEFAULT_COVERAGE) -> float:
    """The share to carry, 0 standing for the default.

    Raises:
        InvalidField: it is not in (0, 1].
    """
    coverage = coverage or default
    if not 0 < coverage <= 1:
        raise InvalidField("coverage", f"must lie in (0, 1], not {coverage:g}; 0 means {default}")
    return coverage


def diff_features(
    sae: SparseAutoencoder,
    source: np.ndarray,
    target: np.ndarray,
    source_features: FeatureActivations,
    target_features: FeatureActivations,
    coverage: float = DEFAULT_COVERAGE,
    max_edits: int = 1000,
) -> FeatureDiff:
    """Picks features greedily until ``coverage`` is reached, from nothing up and from everything down.

    The rest without set S is ``r = D - sum_S c_i``; adding j changes its square by ``|c_j|^2 - 2 c_j . r``. With the
    Gram matrix of the m features that differ, c_j . r is kept up to date by one row a pick, so no d_sae-wide work is
    done (matching pursuit with fixed coefficients; Mallat and Zhang 1993). Upwards the feature that shortens the rest
    most is taken first, and what later picks made needless is dropped again; downwards the one that lengthens it least
    goes first, which finds small sets where features overlap much. The smaller of both sets is returned: the smallest
    of all where decoder vectors are orthogonal, hardly larger otherwise (to be certain takes exponential time).
    Beyond 2,048 differing features only the 2,048 longest c_i are weighed.

    Args:
        sae: for its decoder rows.
        source: float32 [d_in].
        target: float32 [d_in].
        source_features: f(source).
        target_features: f(target).
        coverage: in (0, 1].
        max_edits: most features to pick; then the share carried may be less than asked.
    """
    union = np.union1d(source_features.top_indices, target_features.top_indices).astype(np.int64)
    values = target_features.at(union) - source_features.at(union)
    union, values = union[values != 0], values[values != 0]
    D = sae.combine(union, values)
    wide = target.astype(np.float64) - source
    total = float(wide @ wide)
    error = wide - D
    unexplained = float(error @ error) / total if total > 0 else 0.0
    squared = float(D.astype(np.float64) @ D)
    if squared == 0:
        return _added(union[:0], values[:0], values[:0], 1.0, len(union), unexplained)
    indices, amounts, c = _contenders(sae, union, values)
    contributions = c @ D
    wanted = min(coverage + _TINY, 1 - _TINY)
    gram = c @ c.T
    order, shares = _pursue(gram, contributions.copy(), squared, wanted, min(max_edits, len(indices)))
    if shares and shares[-1] >= wanted:
        upwards = _thin(gram, c, D, wanted, np.isin(np.arange(len(c)), order))
        downwards = _thin(gram, c, D, wanted, np.ones(len(c), dtype=bool))
        picked = min((upwards, downwards), key=len)
    else:
        # Adding features reached the limit on edits; removing them may need fewer.
        picked = _thin(gram, c, D, wanted, np.ones(len(c), dtype=bool))
        if len(picked) > max_edits or len(picked) == len(c):
            # Not reached: the prefix that carries most.
            picked = np.array(order[: int(np.argmax(shares)) + 1], dtype=np.int64)
    picked = picked[np.argsort(-contributions[picked], kind="stable")]
    rest = D.astype(np.float64) - c[picked].sum(axis=0, dtype=np.float64)
    coverage = 1.0 - float(rest @ rest) / squared
    shares = (contributions[picked] / squared).astype(np.float32)
    return _added(indices[picked], amounts[picked], shares, coverage, len(union), unexplained)


def for_another(
    diff: FeatureDiff, source: FeatureActivations, target: FeatureActivations, statistics: FeatureStatistics | None
) -> FeatureDiff:
    """The same difference as edits of another picture, whose own values must give way to those that are carried.

    "Night", added to a picture by day, is a picture by day and night. So a feature that has rivals and that the
    difference turns on (strongly, as the rule for rivals has it) becomes a SWITCH to its activation on the target, and
    what the difference turns off is left to that SWITCH where it is a rival of it. What is turned off without a rival
    in its place is ABLATEd: less than nothing is in no picture. All other edits still ADD.

    Args:
        diff: from source to target.
        source: f(source).
        target: f(target).
        statistics: p99 and rivals; without them the difference stays as it is.
    """
    if statistics is None or len(diff.indices) == 0:
        return diff
    indices, shares, values = diff.indices, diff.shares.copy(), diff.values.copy()
    operations = diff.operations.copy()
    limit = RULE.strong * statistics.p99[indices]
    strong = (target.at(indices) >= limit) & (limit > 0)
    was_strong = (source.at(indices) >= limit) & (limit > 0)
    exclusive = np.diff(statistics.rivals_offsets)[indices] > 0
    switched = strong & ~was_strong & exclusive
    operations[switched] = Operation.SWITCH
    values[switched] = target.at(indices)[switched]
    gone = was_strong & ~strong
    operations[gone], values[gone] = Operation.ABLATE, 0.0
    kept = np.ones(len(indices), dtype=bool)
    place = {int(index): at for at, index in enumerate(indices)}
    for at in np.flatnonzero(switched):
        for rival in statistics.rivals(int(indices[at])).tolist():
            other = place.get(rival)
            if other is not None and kept[other] and diff.values[other] < 0:
                kept[other] = False
                shares[at] += shares[other]
    return diff._replace(indices=indices[kept], operations=operations[kept], values=values[kept], shares=shares[kept])


def _added(
    indices: np.ndarray, values: np.ndarray, shares: np.ndarray, coverage: float, differing: int, unexplained: float
) -> FeatureDiff:
    operations = np.full(len(indices), Operation.ADD, np.int64)
    return FeatureDiff(indices, operations, values, shares, coverage, differing, unexplained)


def _contenders(
    sae: SparseAutoencoder, indices: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The features with the longest ``c_i = values_i d_i``: indices, values and c, float32 [m, d_in]."""
    if len(indices) > _CONTENDERS:
        lengths = np.concatenate(
            [
                np.abs(values[start : start + _CONTENDERS])
                * np.linalg.norm(sae.directions(indices[start : start + _CONTENDERS]), axis=1)
                for start in range(0, len(indices), _CONTENDERS)
            ]
        )
        longest = np.sort(np.argpartition(-lengths, _CONTENDERS)[:_CONTENDERS])
        indices, values = indices[longest], values[longest]
    return indices, values, values[:, None] * sae.directions(indices)


def _pursue(
    gram: np.ndarray, along: np.ndarray, squared: float, coverage: float, at_most: int
) -> tuple[list[int], list[float]]:
    """Picks in order, and the share carried after each.

    Args:
        gram: ``c c^T``, [m, m].
        along: ``c . D``, [m]; changed in place to ``c . r``.
        squared: ``||D||^2``.
        coverage: share to reach.
        at_most: most picks.
    """
    lengths = np.diagonal(gram).copy()
    free = np.ones(len(lengths), dtype=bool)
    order: list[int] = []
    shares: list[float] = []
    rest = squared
    while len(order) < at_most and (not shares or shares[-1] < coverage):
        # The best gain may be negative, where features cancel; going on is still the only way to the whole.
        gains = np.where(free, 2 * along - lengths, -np.inf)
        best = int(np.argmax(gains))
        rest -= float(gains[best])
        free[best] = False
        along -= gram[best]
        order.append(best)
        shares.append(1.0 - rest / squared)
    return order, shares


def _thin(gram: np.ndarray, c: np.ndarray, D: np.ndarray, coverage: float, kept: np.ndarray) -> np.ndarray:
    """Drops picks, the one that lengthens the rest least first, for as long as the others carry ``coverage``.

    Args:
        gram: ``c c^T``, [m, m].
        c: [m, d_in].
        D: the difference, [d_in].
        coverage: share to keep.
        kept: bool [m], the picks to begin with; changed in place.

    Returns:
        int64 [k], the picks that are left, ascending.
    """
    r = D.astype(np.float64) - c[kept].sum(axis=0, dtype=np.float64)
    along, lengths, rest = c @ r, np.diagonal(gram).astype(np.float64), float(r @ r)
    allowed = (1 - coverage) * float(D.astype(np.float64) @ D)
    while kept.any():
        without = np.where(kept, rest + 2 * along + lengths, np.inf)
        least = int(np.argmin(without))
        if without[least] > allowed:
            break
        rest = float(without[least])
        kept[least] = False
        along += gram[least]
    return np.flatnonzero(kept)
