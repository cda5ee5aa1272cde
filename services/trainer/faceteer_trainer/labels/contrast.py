"""Names a feature by the terms that tell the pictures on which it fires strongly from all others.

    z_t = (mean over strong pictures of cos(x, t)  -  mean over all of cos(x, t)) / standard deviation of cos(x, t)

Pictures' embeddings and terms are centred, so a cosine is about what differs and not about being a picture or a text.
Feature *directions* play no part: matched with texts they name nothing for CLIP. Knows nothing of libraries.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from faceteer_trainer.labels.sample import Side
from faceteer_trainer.labels.vocabulary import TextSpace

Floats = npt.NDArray[np.float32]
# Of its own 99th percentile: pictures on which a feature is clearly there.
STRONG = 0.5
_MOST_PICTURES, _FEWEST = 200, 5
_BLOCK = 2048
# A further term is worth naming if it tells at least this much as well as the first.
_NEARLY = 0.6
_MOST_TERMS = 4
_AS_WELL = 0.9


class Named(NamedTuple):
    """What a feature may be called: a label, other words, and how many standard deviations the label stands out by."""

    label: str
    terms: tuple[str, ...]
    z: float


def strong_pictures(side: Side, feature: int) -> npt.NDArray[np.int64]:
    """Places of the pictures on which a feature fires at half its 99th percentile or more, strongest first."""
    places, values = side.fires(feature)
    if len(places) < _FEWEST:
        return places[:0]
    strong = values >= STRONG * np.quantile(values, 0.99)
    order = np.argsort(-values[strong], kind="stable")[:_MOST_PICTURES]
    return places[strong][order]


def name_features(side: Side, space: TextSpace, features: npt.NDArray[np.int64], least_z: float) -> dict[int, Named]:
    """A name for each feature that some term stands out for by ``least_z`` or more."""
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
            named = _name(z[row], space.terms)
            if named.z >= least_z:
                found[int(block[row])] = named
    return found


def _name(z: Floats, terms: tuple[str, ...]) -> Named:
    best = np.argsort(-z, kind="stable")[:20]
    # Of terms that tell as well the shortest is the plainest: "night", not "moonlight" or "midnight".
    equals = [int(term) for term in best if z[term] >= _AS_WELL * z[best[0]]]
    chosen = [min(equals, key=lambda term: (terms[term].count(" "), len(terms[term])))]
    for term in best:
        if term == chosen[0]:
            continue
        if len(chosen) > _MOST_TERMS or z[term] < _NEARLY * z[best[0]]:
            break
        words = set(terms[term].split())
        if not any(words & set(terms[other].split()) for other in chosen):
            chosen.append(int(term))
    return Named(terms[chosen[0]], tuple(terms[term] for term in chosen[1:]), float(z[chosen[0]]))
