"""Names a feature by the terms that tell the pictures on which it fires strongly from all others.

    z_t = (mean over strong pictures of cos(x, t)  -  mean over all of cos(x, t)) / standard deviation of cos(x, t)

Of the terms that stand out most the one with the greatest z_t (AUC_t - 0.5) is the name, where AUC_t says how well the
term's cosine tells pictures on which the feature fires at all from silent ones: the strongest pictures alone may share
by chance what most do not. Pictures' embeddings and terms are centred, so a cosine is about what differs and not about
being a picture or a text. Feature *directions* are not used: matching them with texts in CLIP's space
gives no usable name.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from faceteer_trainer.labels.sample import Side
from faceteer_trainer.labels.scores import balanced_sample
from faceteer_trainer.labels.vocabulary import TextSpace
from faceteer_trainer.metrics import auc

Floats = npt.NDArray[np.float32]
# Share of its own 99th percentile: on these pictures a feature is clearly present.
STRONG = 0.5
_MOST_PICTURES, _FEWEST = 200, 5
_BLOCK = 2048
# A further term is kept if it discriminates at least this well, relative to the first.
_NEARLY = 0.6
_MOST_TERMS, _CANDIDATES = 4, 20
_AS_WELL = 0.9


class Named(NamedTuple):
    """What a feature may be called.

    Attributes:
        label: its name.
        terms: other words for it.
        z: by how many standard deviations the label stands out; 0 if it was not found by that.
        auc: how well the label tells where the feature fires, on the pictures it was made from; NaN where unknown.
    """

    label: str
    terms: tuple[str, ...]
    z: float = 0.0
    auc: float = float("nan")


def strong_pictures(side: Side, feature: int) -> npt.NDArray[np.int64]:
    """Places of the pictures on which a feature fires at half its 99th percentile or more, strongest first."""
    places, values = side.fires(feature)
    if len(places) < _FEWEST:
        return places[:0]
    strong = values >= STRONG * np.quantile(values, 0.99)
    order = np.argsort(-values[strong], kind="stable")[:_MOST_PICTURES]
    return places[strong][order]


def name_features(
    side: Side, space: TextSpace, features: npt.NDArray[np.int64], least_z: float, least_auc: float
) -> dict[int, Named]:
    """A name for each feature that some term stands out for by ``least_z`` or more and tells with ``least_auc``."""
    scores = side.embeds @ space.directions.T
    mean, deviation = scores.mean(0), np.maximum(scores.std(0), 1e-9)
    found: dict[int, Named] = {}
    for start in range(0, len(features), _BLOCK):
        block = features[start : start + _BLOCK]
        strong = [strong_pictures(side, int(feature)) for feature in block]
        sizes = np.array([len(places) for places in strong])
        indptr = np.concatenate([[0], np.cumsum(sizes)])
        weights = np.repeat(1 / np.maximum(sizes, 1), sizes).astype(np.float32)
        average = sparse.csr_matrix((weights, np.concatenate(strong), indptr), (len(block), len(scores)))
        z = (average @ scores - mean) / deviation
        for row in np.flatnonzero(sizes):
            sample = balanced_sample(side, int(block[row]))
            if sample is None:
                continue
            best = np.argsort(-z[row], kind="stable")[:_CANDIDATES]
            best = best[z[row, best] >= least_z]
            told = np.array([auc(scores[sample[0], term], sample[1]) for term in best])
            if (told >= least_auc).any():
                found[int(block[row])] = _name(best, z[row, best], told, least_auc, space.terms)
    return found


def _name(best: npt.NDArray[np.int64], z: Floats, told: Floats, least: float, terms: tuple[str, ...]) -> Named:
    """The name, of the terms ``best`` with their z and AUC."""
    worth = np.where(told >= least, z * (told - 0.5), 0)
    order = np.argsort(-worth, kind="stable")
    order = order[worth[order] >= _NEARLY * worth[order[0]]]
    # Among terms that discriminate equally well the shortest is the plainest: "night", not "moonlight" or "midnight".
    equals = [place for place in order if worth[place] >= _AS_WELL * worth[order[0]]]
    chosen = [min(equals, key=lambda place: (terms[best[place]].count(" "), len(terms[best[place]])))]
    for place in order:
        words = set(terms[best[place]].split())
        if len(chosen) <= _MOST_TERMS and not any(words & set(terms[best[other]].split()) for other in chosen):
            chosen.append(place)
    label, *others = (terms[best[place]] for place in chosen)
    return Named(label, tuple(others), float(z[chosen[0]]), float(told[chosen[0]]))
