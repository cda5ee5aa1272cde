"""How good a library's every part is: figures, and features to look at."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from faceteer_library.editor import Described, LibraryEditor

from faceteer_trainer.labels.quality import SAE_FIGURES
from faceteer_trainer.labels.scores import CAUSES, NOTHING, PREDICTS, agree


class Quartiles(NamedTuple):
    """A distribution in three numbers, and over how many; NaN where there is nothing."""

    low: float
    median: float
    high: float
    measured: int

    @classmethod
    def of(cls, values: list[float]) -> Quartiles:
        """25 %, 50 %, 75 %."""
        if not values:
            return cls(float("nan"), float("nan"), float("nan"), 0)
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        return cls(low, median, high, len(values))


@dataclass(frozen=True)
class LibraryReport:
    """What there is to say.

    Attributes:
        facts: the library's meta.
        features, alive, labelled, iconic: counts; iconic have an icon.
        detection, accuracy, causal: of labels.
        sae: explained_variance, cosine, l0, pictures; empty where no labelling has measured them.
        named_firings: share of all firings that are of features with a label.
        texts: how many different labels there are; commonest: the one that most features share, and how many do.
        still: icons that show no change up to the greatest strength.
        predict, cause: shares of the measured labels that reach the line, and in the tuple's second place the same
            weighted by how often their features fire; both: of those with two scores, that agree.
        best, worst, disagreeing: features to look at.
        missing: parts that have not been made, with the command that makes them.
    """

    facts: dict[str, str]
    features: int
    alive: int
    labelled: int
    iconic: int
    detection: Quartiles
    accuracy: Quartiles
    causal: Quartiles
    sae: dict[str, float]
    named_firings: float
    texts: int
    commonest: tuple[str, int]
    still: int
    predict: tuple[float, float]
    cause: tuple[float, float]
    both: float
    best: list[Described]
    worst: list[Described]
    disagreeing: list[Described]
    missing: list[str]


def report_on(editor: LibraryEditor, shown: int = 12) -> LibraryReport:
    """Reads the whole library; nothing is changed."""
    features = list(editor.features())
    labelled = [feature for feature in features if feature.label]
    detection = [f.detection_score for f in labelled if f.detection_score is not None]
    causal = [f.causal_score for f in labelled if f.causal_score is not None]
    accuracy = [f.detection_balanced_accuracy for f in labelled if f.detection_balanced_accuracy is not None]
    verdicts = [agree(f.detection_score, f.causal_score) for f in labelled]
    measured = [verdict for verdict in verdicts if verdict is not None]
    by_detection = sorted(
        (f for f in labelled if f.detection_score is not None), key=lambda f: -(f.detection_score or 0)
    )
    apart = [f for f, verdict in zip(labelled, verdicts, strict=True) if verdict is False]
    apart.sort(key=lambda f: -abs((f.detection_score or 0) - (f.causal_score or 0)))
    icons = editor.icon_keys()
    firings = sum(feature.firing_share for feature in features)
    texts = Counter(feature.label for feature in labelled).most_common()
    missing = []
    if not labelled:
        missing.append("labels (label-library)")
    if not icons:
        missing.append("icons and causal scores (draw-icons)")
    return LibraryReport(
        editor.facts,
        len(features),
        sum(feature.firing_share > 0 for feature in features),
        len(labelled),
        len(icons),
        Quartiles.of(detection),
        Quartiles.of(accuracy),
        Quartiles.of(causal),
        json.loads(editor.facts.get(SAE_FIGURES, "{}")),
        sum(feature.firing_share for feature in labelled) / firings if firings else float("nan"),
        len(texts),
        texts[0] if texts else ("", 0),
        sum(score == NOTHING for score in causal),
        _shares([(f.detection_score, f.firing_share) for f in labelled], PREDICTS),
        _shares([(f.causal_score, f.firing_share) for f in labelled], CAUSES),
        float(np.mean(measured)) if measured else float("nan"),
        by_detection[:shown],
        by_detection[::-1][:shown],
        apart[:shown],
        missing,
    )


def _shares(scored: list[tuple[float | None, float]], line: float) -> tuple[float, float]:
    """Of (score, weight): the share that reaches the line, plain and weighted; NaN where nothing was measured."""
    known = [(score >= line, weight) for score, weight in scored if score is not None]
    if not known:
        return float("nan"), float("nan")
    hits, weights = np.array(known, float).T
    return float(hits.mean()), float(hits @ weights / max(weights.sum(), 1e-12))
