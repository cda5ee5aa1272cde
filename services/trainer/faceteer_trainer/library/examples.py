"""Which pictures show what a feature is: the strongest, near-identical ones once, and some from every quantile.

Knows nothing of files or of how pictures look; embeddings tell which are nearly the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# Cosine of the embeddings, with the corpus' mean taken off, above which two pictures count as the same one.
SAME = 0.98
QUANTILES = ((0.75, 1.0), (0.5, 0.75), (0.25, 0.5), (0.0, 0.25))


class Chosen(NamedTuple):
    """One example of one feature: its place in the list, the picture, the activation, between which quantiles."""

    selection: str
    rank: int
    row: int
    activation: float
    quantiles: tuple[float, float] = (0.0, 0.0)


def strongest(rows: Ints, values: Floats, embeds: Floats, most: int) -> list[Chosen]:
    """The first `most` of the candidates, strongest first, leaving out what looks like one that is in already.

    ``embeds``: of the candidates' pictures, centred, float32 [m, d].
    """
    kept: list[int] = []
    if len(rows) > 1:
        vectors = embeds / np.maximum(np.linalg.norm(embeds, axis=1, keepdims=True), 1e-12)
        same = vectors @ vectors.T > SAME
        for place in range(len(rows)):
            if not same[place, kept].any():
                kept.append(place)
            if len(kept) == most:
                break
    else:
        kept = list(range(len(rows)))
    return [Chosen("strongest", rank, int(rows[p]), float(values[p])) for rank, p in enumerate(kept)]


def from_quantiles(rows: Ints, values: Floats, ranks: Floats, each: int, taken: set[int]) -> list[Chosen]:
    """Up to `each` pictures of a uniform sample from every quantile of the activation, the strongest quantile first.

    ``ranks``: the share of the feature's pictures that are weaker, for each of the sample; ``taken`` are left out.
    """
    found: list[Chosen] = []
    for low, high in QUANTILES:
        inside = [p for p in range(len(rows)) if low <= ranks[p] < high or (high == 1.0 and ranks[p] >= low)]
        inside = [p for p in inside if int(rows[p]) not in taken][:each]
        for place in sorted(inside, key=lambda p: -values[p]):
            found.append(Chosen("quantiles", len(found), int(rows[place]), float(values[place]), (low, high)))
    return found
