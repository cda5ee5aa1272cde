"""Says what an icon shows by a classifier of renders, which had no part in the labels.

For every factor value the classifier gives a probability; a value has moved by as much as its probability has. A change
is visible where the classifier changes its mind about a factor: where the total variation between a factor's two
distributions passes one half. All strengths count alike, and one that shows nothing counts as chance: of two features
that cause the same, the one that causes it at half strength is the better.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from faceteer_trainer.labels.scores import causal_score
from PIL import Image

from faceteer_postcards.evaluation.judge import Judge
from faceteer_postcards.movq import to_tensor
from faceteer_postcards.render import SIZE
from faceteer_postcards.words import MEANT
from faceteer_postcards.world import FACTORS, VALUES

Floats = npt.NDArray[np.float32]
# Of a factor's probability. On a blurred template the classifier wavers by up to 0.4 where nobody sees a change.
_UNSEEN = 0.5
_FACTORS = [[place for place, (name, _) in enumerate(VALUES) if name == factor] for factor in FACTORS]
_PLACES = {value: place for place, value in enumerate(VALUES)}


class ClassifierJudge:
    """Judges the labels that name a factor value."""

    name = "classifier"

    def __init__(self, classifier: Judge) -> None:
        self._classifier = classifier

    def knows(self, label: str) -> bool:
        """Whether the label names a factor value."""
        return label in MEANT

    def score(self, pictures: Sequence[Image.Image], label: str) -> float | None:
        """The causal score, of the template, then of each strength.

        None: nothing has changed that the classifier sees, or the template shows the value already.
        """
        shown = self._probabilities(pictures)
        place = _PLACES[MEANT[label]]
        if shown[0, place] > 0.5:
            return None
        moved = shown[1:] - shown[:1]
        changed = np.stack([np.abs(moved[:, places]).sum(1) / 2 for places in _FACTORS], 1)
        seen = changed.max(1) > _UNSEEN
        # Values that stay where they are tie, and so do all where nothing is seen.
        moved = np.where(seen[:, None], np.round(moved, 2), 0)
        return causal_score(moved, np.full(len(seen), seen.any(), np.float32), place)

    @torch.no_grad()
    def _probabilities(self, pictures: Sequence[Image.Image]) -> Floats:
        """Of each picture and each of `VALUES`, [n, 38]."""
        pixels = np.stack([np.asarray(picture.convert("RGB").resize((SIZE, SIZE))) for picture in pictures])
        logits = self._classifier(to_tensor(pixels))
        return np.asarray(torch.cat([factor.softmax(-1) for factor in logits], 1).numpy(), np.float32)
