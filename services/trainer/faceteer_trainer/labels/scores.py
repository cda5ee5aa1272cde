"""Is a label true? Two scores: whether it predicts where its feature fires, and whether the feature causes it.

**Detection**, on pictures that the label was not made from: a picture's score is its cosine with the label's text, and
a good label scores pictures on which the feature fires above those on which it is silent.

**Causal**, on the feature's icon: the template, and the feature switched on. A judge says how much more each label is
true of the picture at strength s than of the template, m_s. The score is the share of all other labels o towards which
the picture has moved less than towards the feature's own label t, averaged over the strengths, of which each counts by
how much has changed beyond what cannot be seen, w_s::

    share_s = mean over o of [ m_s(t)  >  m_s(o) ]      (ties count half)
    score = sum of w_s share_s / sum of w_s;  not measured where every w_s is 0

0.5 is chance; 1 means that nothing else in the library describes the change better. An icon that shows no change says
nothing about a label, so its score is unknown.

The judge that every bundle has is its own text tower: m_s(t) = (x_s - x_0) . t, w_s = max(0, |x_s - x_0| - 0.1 |x_0|),
with embeddings x and texts centred and of norm 1. It gave the labels too, so that what it mistakes for a label it
mistakes again; a judge that had no part in them is better, and the library says which one it was.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from faceteer_encoder.model import ClipEncoder
from faceteer_encoder.preprocess import Preprocessor
from PIL import Image

from faceteer_trainer.labels.sample import Side
from faceteer_trainer.metrics import auc

Floats = npt.NDArray[np.float32]
_MOST, _FEWEST = 200, 8
# Share of the template's norm. A picture stored twice as WebP moves by up to 0.04, a changed one by 0.15 and more.
_UNSEEN = 0.1
# AUC from which on a label predicts where its feature fires, and share from which on it says what the feature causes;
# the library service's filter `scores_disagree` uses the same two numbers.
PREDICTS, CAUSES = 0.7, 0.7


class Detection(NamedTuple):
    """How well a label predicts.

    Attributes:
        auc: area under the ROC curve, 0.5 for chance.
        balanced_accuracy: the mean of the shares of firing and of silent pictures told rightly, 0.5 for chance; the
            threshold was chosen on the pictures the label was made from.
    """

    auc: float
    balanced_accuracy: float


def balanced_sample(
    side: Side, feature: int, seed: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]] | None:
    """As many pictures on which the feature fires, weak ones included, as silent ones; None where there are too few."""
    places, _ = side.fires(feature)
    silent = len(side.rows) - len(places)
    count = min(len(places), silent, _MOST)
    if count < _FEWEST:
        return None
    rng = np.random.default_rng((seed, feature))
    firing = rng.choice(places, count, replace=False)
    quiet = np.ones(len(side.rows), bool)
    quiet[places] = False
    others = rng.choice(np.flatnonzero(quiet), count, replace=False)
    return np.concatenate([firing, others]), np.arange(2 * count) < count


def best_threshold(scores: Floats, fires: npt.NDArray[np.bool_]) -> float:
    """The score from which on to say "fires" so that the balanced accuracy is greatest."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(fires[order]) / max(fires.sum(), 1)
    false = np.cumsum(~fires[order]) / max((~fires).sum(), 1)
    at = int(np.argmax(hits - false))
    low = scores[order[at]]
    high = scores[order[at + 1]] if at + 1 < len(scores) else low
    return float((low + high) / 2)


def detect(making: Side, judging: Side, feature: int, text: Floats) -> Detection | None:
    """The scores of one label, whose centred text embedding [d] of norm 1 is ``text``; None with too few pictures."""
    learn, judge = balanced_sample(making, feature), balanced_sample(judging, feature)
    if learn is None or judge is None:
        return None
    threshold = best_threshold(making.embeds[learn[0]] @ text, learn[1])
    scores = judging.embeds[judge[0]] @ text
    says = scores >= threshold
    accuracy = ((says & judge[1]).sum() / judge[1].sum() + (~says & ~judge[1]).sum() / (~judge[1]).sum()) / 2
    return Detection(auc(scores, judge[1]), float(accuracy))


class IconJudge(Protocol):
    """Says what an icon's pictures show.

    Attributes:
        name: one of :data:`faceteer_library.schema.CAUSAL_JUDGES`.
    """

    name: str

    def knows(self, label: str) -> bool:
        """Whether it can tell what the label says."""

    def score(self, pictures: Sequence[Image.Image], label: str) -> float | None:
        """The causal score of a label it knows: of the template, then of each strength. None: there is no change."""


class TextTowerJudge:
    """The bundle's own text tower: what every bundle has, and what gave the labels.

    Args:
        encoder, preprocessor: the bundle's.
        labels: all distinct ones; at least two.
        directions: of each, float32 [t, d], centred and of norm 1.
    """

    name = "text_tower"

    def __init__(
        self, encoder: ClipEncoder, preprocessor: Preprocessor, labels: Sequence[str], directions: Floats
    ) -> None:
        self._encoder, self._preprocessor, self._directions = encoder, preprocessor, directions
        self._places = {label: place for place, label in enumerate(labels)}

    def knows(self, label: str) -> bool:
        """Every one of the labels."""
        return label in self._places

    def score(self, pictures: Sequence[Image.Image], label: str) -> float | None:
        """See :class:`IconJudge`."""
        embeds = embed_pictures(self._encoder, self._preprocessor, pictures)
        return causal_score(*moves_of(embeds, self._directions), self._places[label])


def moves_of(embeds: Floats, directions: Floats) -> tuple[Floats, Floats]:
    """What the text tower says of an icon.

    Args:
        embeds: of the template, then of each strength, float32 [1 + s, d]; raw.
        directions: of all labels, float32 [t, d], centred and of norm 1.

    Returns:
        How far each strength has moved towards each label, [s, t], and how much has changed to be seen, [s].
    """
    change = embeds[1:] - embeds[:1]
    seen = np.maximum(np.linalg.norm(change, axis=1) - _UNSEEN * np.linalg.norm(embeds[0]), 0)
    return np.asarray(change @ directions.T), np.asarray(seen, np.float32)


def causal_score(moved: Floats, weights: Floats, label: int) -> float | None:
    """The score of one icon; None where nothing has changed to be seen.

    Args:
        moved: how much more each label is true of each strength than of the template, [s, t]; t at least two.
        weights: how much has changed to be seen at each strength, [s]; 0 and more.
        label: the feature's own, by its place among the labels.
    """
    if not weights.any():
        return None
    own = moved[:, label : label + 1]
    others = np.delete(moved, label, axis=1)
    shares = ((own > others) + 0.5 * (own == others)).mean(1)
    return float(weights @ shares / weights.sum())


def embed_pictures(encoder: ClipEncoder, preprocessor: Preprocessor, pictures: Sequence[Image.Image]) -> Floats:
    """Embeddings of pictures, float32 [n, d], computed as the service does."""
    pixels = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "PNG", compress_level=1)
        pixels.append(preprocessor.pixels(buffer.getvalue()))
    return np.stack(encoder.encode_images(pixels))


def agree(detection: float | None, causal: float | None) -> bool | None:
    """Whether both say yes or both say no; None where one of them was not measured."""
    if detection is None or causal is None:
        return None
    return (detection >= PREDICTS) == (causal >= CAUSES)
