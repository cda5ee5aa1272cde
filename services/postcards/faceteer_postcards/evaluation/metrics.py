"""The evaluation's measures, each as a formula one can check by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Share:
    """`hits` of `count`, with the Wilson interval at 95 %."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        """hits / count; 0 of nothing."""
        return self.hits / self.count if self.count else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 1927: the shares that this sample does not speak against."""
        return wilson(self.hits, self.count)

    def __add__(self, other: Share) -> Share:
        """Both samples together."""
        return Share(self.hits + other.hits, self.count + other.count)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        low, high = self.interval
        return {"share": round(self.value, 4), "low": round(low, 4), "high": round(high, 4), "count": self.count}


def wilson(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share."""
    if count == 0:
        return 0.0, 1.0
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def share_of(mask: npt.NDArray[np.bool_]) -> Share:
    """The share of True in a mask."""
    return Share(int(mask.sum()), int(mask.size))


def monosemanticity(activations: Floats, similarity: Floats) -> float:
    """The mean similarity of picture pairs, each weighted by both activations (Pach et al. 2025).

    activations [m] >= 0 of one feature, similarity [m, m] by another model; a picture is not paired with itself.
    """
    top = activations.max()
    if top <= 0:
        return float("nan")
    weight = activations / top
    off_diagonal = weight.sum() ** 2 - (weight**2).sum()
    if off_diagonal <= 0:
        return float("nan")
    return float((weight @ similarity @ weight - (weight**2 * np.diag(similarity)).sum()) / off_diagonal)
