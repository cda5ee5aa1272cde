"""The two pictures that icons start from, chosen so that every feature shows a change on at least one of them.

A feature that is on in the template already cannot be turned on. Such a feature is shown on a second template, which
has as little as possible in common with the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from faceteer_sae.model import SparseAutoencoder
from scipy import sparse

Floats = npt.NDArray[np.float32]
# The fact in a library's meta, packed as the first template is; the service's own icons know only the first.
OTHER_TEMPLATE = "icon_template_other"
# Share of its 99th percentile: from here on a feature counts as on in a picture.
ON = 0.25


def plainest(embeds: Floats) -> Floats:
    """The first template, of embeddings [m, d]: the one nearest to their mean."""
    return np.asarray(embeds[np.linalg.norm(embeds - embeds.mean(0), axis=1).argmin()])


def scaled(sae: SparseAutoencoder, embeds: Floats, p99: Floats) -> Floats:
    """A picture's activations in SCALED units, float32 [d_sae]; 0 for dead features."""
    (active,) = sae.encode(embeds[None])
    return np.asarray(
        np.divide(active.at(np.arange(sae.d_sae)), p99, out=np.zeros(sae.d_sae, np.float32), where=p99 > 0)
    )


def least_in_common(first: Floats, acts: sparse.csc_matrix, p99: Floats, embeds: Floats, mean: Floats) -> int:
    """Which picture has the least in common with the first template; among the hundredth with least, the plainest.

    Args:
        first: the first template's SCALED activations, [d_sae].
        acts: RAW activations of pictures, sparse columns [m, d_sae].
        p99: the unit SCALED of each feature, [d_sae].
        embeds: of the pictures, float32 [m, d].
        mean: of all pictures' embeddings, [d]; the plainest is the nearest to it.
    """
    common = np.zeros(acts.shape[0])
    for feature in np.flatnonzero(first >= ON):
        part = slice(acts.indptr[feature], acts.indptr[feature + 1])
        common[acts.indices[part]] += np.minimum(acts.data[part] / p99[feature], 1) * min(first[feature], 1)
    least = np.flatnonzero(common <= np.quantile(common, 0.01))
    return int(least[np.linalg.norm(embeds[least] - mean, axis=1).argmin()])


def template_of(feature: int, templates: Sequence[Floats], activations: Sequence[Floats]) -> Floats:
    """The template for a feature: the first, unless the feature is on there and weaker on the other."""
    if activations[0][feature] < ON:
        return templates[0]
    return templates[int(np.argmin([scaled[feature] for scaled in activations]))]
