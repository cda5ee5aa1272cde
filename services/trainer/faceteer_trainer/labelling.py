"""Name features from words alone: what captions of pictures in which a feature fires say, and others do not.

Generic in what the captions are of; it reads no ground truth.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# a run of words may not start or end with one of these
_EDGE_WORDS = frozenset({
    "a", "an", "the", "of", "in", "on", "at", "by", "with", "as", "to", "and", "is", "it", "its", "just", "some",
    "while",
})  # fmt: skip
_FILLER = frozenset(["picture", "postcard", "drawing", "something", "scene", "thing", "things"])


@dataclass(frozen=True)
class Label:
    """A feature's name, what else its captions say, and how much more often than others: 0..1."""

    text: str
    terms: tuple[str, ...]
    confidence: float


def terms_of(text: str, longest: int = 3) -> set[str]:
    """The runs of up to `longest` words in a caption that neither start nor end with a small word."""
    words = re.findall(r"[a-z']+", text.lower())
    found = set()
    for start in range(len(words)):
        for stop in range(start + 1, min(start + longest, len(words)) + 1):
            run = words[start:stop]
            if run[0] in _EDGE_WORDS or run[-1] in _EDGE_WORDS or _FILLER & set(run) or run[-1] in ("no", "without"):
                continue
            found.add(" ".join(run))
    return found


class CaptionIndex:
    """Which terms occur in which captions, rare terms left out."""

    def __init__(self, captions: list[str], least: int = 20) -> None:
        sets = [terms_of(text) for text in captions]
        counts = Counter(term for terms in sets for term in terms)
        self.terms = sorted(term for term, count in counts.items() if count >= least)
        number = {term: i for i, term in enumerate(self.terms)}
        self.rows = [np.array(sorted(number[t] for t in terms if t in number), np.int64) for terms in sets]

    def counts(self, pictures: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many of these pictures' captions hold each term."""
        if len(pictures) == 0:
            return np.zeros(len(self.terms), np.int64)
        return np.bincount(np.concatenate([self.rows[i] for i in pictures]), minlength=len(self.terms))


def contrast(
    top: npt.NDArray[np.int64], top_size: int, rest: npt.NDArray[np.int64], rest_size: int
) -> npt.NDArray[np.float64]:
    """z of two proportions for each term: how surely it is commoner in `top` captions than in `rest`."""
    share_top, share_rest = top / max(top_size, 1), rest / max(rest_size, 1)
    pooled = (top + rest + 0.5) / (top_size + rest_size + 1)
    spread = np.sqrt(pooled * (1 - pooled) * (1 / max(top_size, 1) + 1 / max(rest_size, 1)))
    return (share_top - share_rest) / np.maximum(spread, 1e-9)


def label_feature(activations: npt.NDArray[np.floating], index: CaptionIndex, most: int = 2000) -> Label | None:
    """The label of one feature from its activations [m] on the indexed captions' pictures; None if words fail."""
    peak = np.quantile(activations[activations > 0], 0.99) if (activations > 0).any() else 0.0
    firing = np.flatnonzero(activations >= 0.5 * peak) if peak > 0 else np.array([], np.int64)
    firing = firing[np.argsort(-activations[firing], kind="stable")][:most]
    if len(firing) < 20:
        return None
    rest = np.flatnonzero(activations <= 0)
    here, there = index.counts(firing), index.counts(rest)
    # among the terms that are surely commoner here, the one that tells most of these captions from the others
    scores = here / len(firing) - there / max(len(rest), 1)
    sure = contrast(here, len(firing), there, len(rest)) >= 5
    lift = (here / len(firing) + 1e-4) / (there / max(len(rest), 1) + 1e-4)
    scores[~sure | (lift < 1.5) | (here < 10)] = -np.inf
    order = np.argsort(-scores, kind="stable")
    # of terms that do nearly as well the shortest is the plainest: "dusk", not "evening" or "sunset"
    near = [term for term in order if scores[term] >= 0.8 * scores[order[0]] and np.isfinite(scores[term])]
    near.sort(key=lambda term: len(index.terms[term]))
    order = [*near, *order[len(near) :]]
    chosen: list[int] = []
    for term in order:
        if not np.isfinite(scores[term]) or len(chosen) == 4:
            break
        if chosen and scores[term] < (0.2 if lift[chosen[0]] >= 10 else 0.1) * scores[chosen[0]]:
            break
        words = set(index.terms[term].split())
        if all(not words & set(index.terms[other].split()) for other in chosen):
            chosen.append(int(term))
    if not chosen:
        return None
    best = chosen[0]
    confidence = float(1 - 1 / lift[best])
    text = index.terms[best]
    if lift[best] < 10 and len(chosen) > 1:  # the word is common elsewhere too: a second one says where it is meant
        text = f"{text}, {index.terms[chosen[1]]}"
    return Label(text, tuple(index.terms[term] for term in chosen[1:]), round(max(confidence, 0.0), 3))
