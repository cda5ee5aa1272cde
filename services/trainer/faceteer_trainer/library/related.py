"""Which features belong together: by firing together, by never doing so, by direction.

Every function answers lists of (feature, score), best first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from faceteer_sae.rows import Rows

from faceteer_trainer.library.encoding import Active
from faceteer_trainer.library.tallies import Pairs

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Relatives = list[tuple[int, float]]

# Fewer pictures with both than this say nothing.
_LEAST_TOGETHER = 5
_LEAST_LIFT = 1.2
_SLACK = 20


class RivalRule(NamedTuple):
    """When two features are rivals: see `faceteer_trainer.sae.statistics.find_rivals`.

    Attributes:
        strong: of its own p99; weaker firing does not count.
        least_share: of pictures on which each must fire strongly.
        least_expected: pictures with both that independence would predict; fewer could be kept apart by chance.
        most_ratio: of that expectation that may be seen.
    """

    strong: float = 0.3
    least_share: float = 0.01
    least_expected: float = 20.0
    most_ratio: float = 0.1


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
    # Of equal ones first the one that is seen together more often: the other may be chance.
    best = np.lexsort((-together, -np.round(lifts, 6)))[:most]
    return [(int(others[b]), float(lifts[b])) for b in best if lifts[b] > _LEAST_LIFT]


class Rivals(NamedTuple):
    """Every feature's rivals in compressed rows: feature f's are entries offsets[f] to offsets[f + 1].

    Attributes:
        offsets: int64 [d_sae + 1].
        indices: int32 [entries], rising within a feature.
        lifts: float32 [entries], strong firings together over those that independence predicts.
        strong_count: int64 [d_sae], pictures on which each feature fires strongly.
    """

    offsets: Ints
    indices: npt.NDArray[np.int32]
    lifts: Floats
    strong_count: Ints

    def best(self, feature: int, most: int) -> Relatives:
        """The rivals that it meets least, among equals the commonest, with their lift."""
        part = slice(self.offsets[feature], self.offsets[feature + 1])
        others, lifts = self.indices[part], self.lifts[part]
        order = np.lexsort((-self.strong_count[others], lifts))[:most]
        return [(int(others[o]), float(lifts[o])) for o in order]


def rivals(strong: Pairs, strong_count: Ints, pictures: int, rule: RivalRule) -> Rivals:
    """For each common feature, those that hardly ever fire strongly together with it though chance would have it so."""
    counts = strong_count[strong.features]
    common = counts >= rule.least_share * pictures
    sizes = np.zeros(len(strong_count), np.int64)
    indices, lifts = [np.empty(0, np.int32)], [np.empty(0, np.float32)]
    for place in np.flatnonzero(common):
        expected = counts[place].astype(np.float64) * counts / pictures
        together = strong.together[place]
        apart = common & (expected >= rule.least_expected) & (together < rule.most_ratio * expected)
        apart[place] = False
        others = np.flatnonzero(apart)
        sizes[strong.features[place]] = len(others)
        indices.append(strong.features[others].astype(np.int32))
        lifts.append((together[others] / expected[others]).astype(np.float32))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Rivals(offsets, np.concatenate(indices), np.concatenate(lifts), strong_count)


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
