"""Does a label predict where its feature fires? Measured on pictures that the label was not made from.

A picture's score is its cosine with the label's text; a good label scores pictures on which the feature fires above
those on which it is silent. Knows nothing of how labels are made.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from faceteer_trainer.labels.sample import Side
from faceteer_trainer.metrics import auc

Floats = npt.NDArray[np.float32]
_MOST, _FEWEST = 200, 8


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
