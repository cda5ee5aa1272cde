"""Related features, by firing together or by direction: lists of (feature, score), best first.

Features that exclude each other are found by :mod:`faceteer_sae.rivals`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from faceteer_sae.rows import Rows

from faceteer_trainer.library.encoding import Active
from faceteer_trainer.library.tallies import Pairs

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Relatives = list[tuple[int, float]]

# Fewer pictures with both than this are no evidence.
_LEAST_TOGETHER = 5
_LEAST_LIFT = 1.2
_SLACK = 20


def lift(together: npt.NDArray[np.integer], count_a: Ints, count_b: Ints, pictures: int) -> npt.NDArray[np.float64]:
    """P(both) / (P(a) P(b)): 1 where two features are independent."""
    expected = count_a.astype(np.float64) * count_b / pictures
    return np.asarray(together / np.maximum(expected, 1e-12))


def coactivating_common(pairs: Pairs, count: Ints, pictures: int, most: int) -> dict[int, Relatives]:
    """For each counted feature, those counted features with the greatest lift; exact."""
    found: dict[int, Relatives] = {}
    shares = count[pairs.features]
    for place, feature in enumerate(pairs.features):
        together = pairs.together[place].copy()
        together[place] = 0
        lifts = lift(together, shares[place : place + 1], shares, pictures)
        lifts[together < _LEAST_TOGETHER] = 0
        best = np.argsort(-lifts, kind="stable")[:most]
        found[int(feature)] = [(int(pairs.features[b]), float(lifts[b])) for b in best if lifts[b] > _LEAST_LIFT]
    return found


def coactivating_sampled(sampled: Active, count: Ints, pictures: int, most: int, feature: int) -> Relatives:
    """The features with the greatest lift beside one feature, from a uniform sample of the pictures on which it fires.

    Args:
        sampled: all that fires on the sampled pictures.
        count: pictures on which each feature fires, int64 [d_sae].
        pictures: in all.
        most: to return.
        feature: itself, which is left out.
    """
    size = len(sampled.indptr) - 1
    others, together = np.unique(sampled.indices, return_counts=True)
    good = (others != feature) & (together >= min(_LEAST_TOGETHER, size))
    others, together = others[good], together[good]
    # P(other | feature) / P(other)
    lifts = together / max(size, 1) * pictures / np.maximum(count[others], 1)
    # Among equals the pair seen together more often comes first: the other may be chance.
    best = np.lexsort((-together, -np.round(lifts, 6)))[:most]
    return [(int(others[b]), float(lifts[b])) for b in best if lifts[b] > _LEAST_LIFT]


@torch.inference_mode()
def nearest(
    rows: Rows, most: int, wanted: Ints, device: str = "cpu", report: Callable[[str, float], None] | None = None
) -> dict[int, Relatives]:
    """The features with the closest decoder directions, by cosine, of each wanted one; among the wanted ones.

    Screened in bfloat16, the best few computed again in float32.
    """
    target = torch.device(device)
    directions = torch.from_numpy(_unit(rows, wanted))
    screened = directions.to(target, torch.bfloat16)
    keep = min(most + 1 + _SLACK, len(wanted))
    found: dict[int, Relatives] = {}
    for start in range(0, len(wanted), 512):
        part = slice(start, min(start + 512, len(wanted)))
        if report is not None:
            report("nearest directions", part.stop / len(wanted))
        columns = (screened[part] @ screened.T).topk(keep, dim=1).indices.cpu()
        exact = torch.einsum("bkd,bd->bk", directions[columns], directions[part])
        for row, (places, scores) in enumerate(zip(columns.numpy(), exact.numpy(), strict=True)):
            order = [o for o in np.argsort(-scores, kind="stable") if places[o] != start + row][:most]
            found[int(wanted[start + row])] = [(int(wanted[places[o]]), float(scores[o])) for o in order]
    return found


def _unit(rows: Rows, wanted: Ints) -> Floats:
    vectors = np.empty((len(wanted), rows.values.shape[1]), np.float32)
    for start in range(0, len(wanted), 4096):
        block = rows.take(wanted[start : start + 4096])
        vectors[start : start + 4096] = block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)
    return vectors
