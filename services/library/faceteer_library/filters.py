"""Which features a list or search keeps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from faceteer_library.catalogue import SOURCES, Catalogue

PREDICTS = CAUSES = 0.7
"""From this detection score on a label predicts where its feature fires; from this causal score on it causes it."""


@dataclass(frozen=True)
class Filter:
    """Conditions that must all hold; None asks nothing. Fields as in FeatureFilter of the contract.

    A bound on a score keeps only features that have the score. ``scores_disagree`` keeps only features with both
    scores, of which exactly one (True), or both or neither (False), reach 0.7.
    """

    alive: bool | None = None
    labelled: bool | None = None
    min_firing_share: float | None = None
    max_firing_share: float | None = None
    min_detection_score: float | None = None
    max_detection_score: float | None = None
    min_causal_score: float | None = None
    max_causal_score: float | None = None
    scores_disagree: bool | None = None
    sources: tuple[str, ...] = ()

    def mask(self, catalogue: Catalogue) -> np.ndarray | None:
        """Bool [n], which features are kept; None for all."""
        figures = catalogue.figures
        conditions = []
        if self.alive is not None:
            conditions.append((figures["firing_share"] > 0) == self.alive)
        if self.labelled is not None:
            conditions.append((catalogue.labels != 0) == self.labelled)
        # Comparisons with NaN, a score that is not known, are false.
        for name in ("firing_share", "detection_score", "causal_score"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least is not None:
                conditions.append(figures[name] >= least)
            if most is not None:
                conditions.append(figures[name] <= most)
        if self.scores_disagree is not None:
            detection, causal = figures["detection_score"], figures["causal_score"]
            both = ~np.isnan(detection) & ~np.isnan(causal)
            conditions.append(both & (((detection >= PREDICTS) != (causal >= CAUSES)) == self.scores_disagree))
        if self.sources:
            conditions.append(np.isin(catalogue.sources, [SOURCES.index(source) for source in self.sources]))
        return np.logical_and.reduce(conditions) if conditions else None
