"""The rule for rivals: common features that hardly ever fire strongly together, such as "day" and "night".

`switch` sets a feature and ablates its rivals; build-library lists them; train-sae and import-sae write them into
feature_statistics.safetensors. All of them call :func:`find_rivals`, which needs only counts of pictures.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class RivalRule(NamedTuple):
    """When two features are rivals.

    Attributes:
        strong: share of its own p99 above which a feature fires strongly; a mere flicker counts as silence.
        least_share: of the pictures on which each of the two must fire strongly.
        least_expected: pictures with both that independence must predict; fewer could be kept apart by chance.
        most_ratio: rivals fire together on fewer pictures than this ratio of that prediction.
    """

    strong: float = 0.3
    least_share: float = 0.01
    least_expected: float = 20.0
    most_ratio: float = 0.1


RULE = RivalRule()


class Rivals(NamedTuple):
    """Every feature's rivals in compressed sparse rows: those of feature i are entries offsets[i] to offsets[i + 1].

    Attributes:
        offsets: int64 [d_sae + 1].
        indices: int32 [entries], ascending within a feature.
        lifts: float32 [entries], pictures with both over those that independence predicts.
        strong_count: int64 [d_sae], pictures on which each feature fires strongly.
    """

    offsets: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int32]
    lifts: npt.NDArray[np.float32]
    strong_count: npt.NDArray[np.int64]

    def best(self, feature: int, most: int) -> list[tuple[int, float]]:
        """The rivals with the smallest lift, and their lift; of equal ones the commonest first."""
        part = slice(self.offsets[feature], self.offsets[feature + 1])
        others, lifts = self.indices[part], self.lifts[part]
        order = np.lexsort((-self.strong_count[others], lifts))[:most]
        return [(int(others[o]), float(lifts[o])) for o in order]


def find_rivals(
    features: npt.NDArray[np.integer],
    together: npt.NDArray[np.integer],
    strong_count: npt.NDArray[np.int64],
    pictures: int,
    rule: RivalRule = RULE,
) -> Rivals:
    """The rivals among some features; all others have none.

    Args:
        features: int [n], ascending: those whose pairs were counted, which should be the commonest.
        together: int [n, n], pictures on which both fire strongly; the diagonal is not looked at.
        strong_count: int64 [d_sae], pictures on which each feature fires strongly.
        pictures: all that were looked at.
        rule: the limits.
    """
    counts = strong_count[features]
    common = counts >= rule.least_share * pictures
    sizes = np.zeros(len(strong_count), np.int64)
    indices, lifts = [np.empty(0, np.int32)], [np.empty(0, np.float32)]
    for place in np.flatnonzero(common):
        expected = counts[place].astype(np.float64) * counts / pictures
        apart = common & (expected >= rule.least_expected) & (together[place] < rule.most_ratio * expected)
        apart[place] = False
        others = np.flatnonzero(apart)
        sizes[features[place]] = len(others)
        indices.append(features[others].astype(np.int32))
        lifts.append((together[place][others] / expected[others]).astype(np.float32))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Rivals(offsets, np.concatenate(indices), np.concatenate(lifts), strong_count)
