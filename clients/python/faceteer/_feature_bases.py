"""What the blocking and the asyncio features share: all that needs no call, and lists of them.

Knows nothing of drivers; :mod:`faceteer._client_features` and :mod:`faceteer._async_client_features` add the calls.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self, SupportsIndex, TypeVar, overload

from faceteer._bases import Bound
from faceteer._effects import Operation
from faceteer._facts import FeatureExample, FeatureFacts, FeatureStatistics, LabelSource, RelatedFeature
from faceteer._feature_views import (
    MOST_CARDS,
    examples_view,
    feature_view,
    features_view,
)
from faceteer._html import FILE_BYTES, NOTEBOOK_BYTES, save_page
from faceteer._icons import FeatureIcon
from faceteer._library import examples_of_many
from faceteer._opening import Context

D = TypeVar("D")
F = TypeVar("F", bound="FeatureBase[Any]")

# Seconds that a view may wait for pictures: a notebook's cell should not hang because a server is gone.
NOTEBOOK_SECONDS = 3.0
FILE_SECONDS = 60.0


class FeatureExamples(list[FeatureExample]):
    """Pictures on which a feature fires; a list that a notebook shows as pictures."""

    def _repr_html_(self) -> str:
        return examples_view(self)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the pictures as a page of its own, and returns the path."""
        return save_page(path, "Examples", examples_view(self, budget=FILE_BYTES))


class FeatureBase(Bound[D]):
    """A feature as the library knows it."""

    def __init__(self, driver: D, context: Context, facts: FeatureFacts) -> None:
        super().__init__(driver, context)
        self._facts = facts
        # What was fetched already, for views: None where nothing was asked for yet.
        self._seen: list[FeatureExample] | None = None
        self._icon: FeatureIcon | None = None

    @property
    def index(self) -> int:
        """In [0, d_sae)."""
        return self._facts.index

    @property
    def label(self) -> str:
        """What it means, in a few words; empty when nobody knows."""
        return self._facts.label

    @property
    def name(self) -> str:
        """Its label, or "#412"."""
        return self.label or f"#{self.index}"

    @property
    def label_source(self) -> LabelSource:
        """Who says so: "automatic", "model", "person", or "" without a label."""
        return self._facts.label_source

    @property
    def statistics(self) -> FeatureStatistics:
        """How it behaves on the library's corpus."""
        return self._facts.statistics

    @property
    def coactivating(self) -> tuple[RelatedFeature, ...]:
        """Features that fire together with it; score is the lift. Empty for a feature out of a list."""
        return self._facts.coactivating

    @property
    def rivals(self) -> tuple[RelatedFeature, ...]:
        """Features that hardly ever fire with it; score is the lift. Empty for a feature out of a list."""
        return self._facts.rivals

    @property
    def nearest(self) -> tuple[RelatedFeature, ...]:
        """Features with the closest decoder directions; score is the cosine. Empty for a feature out of a list."""
        return self._facts.nearest

    @property
    def terms(self) -> tuple[str, ...]:
        """Other words that describe it, best first; may be empty."""
        return self._facts.terms

    @property
    def safety_class(self) -> str:
        """The operator's safety class; empty for none."""
        return self._facts.safety_class

    @property
    def score(self) -> float | None:
        """How well it fits the search that found it, comparable within that search; None otherwise."""
        return self._facts.score

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        statistics = dict(vars(self.statistics))
        histogram = statistics.pop("histogram")
        return {
            "index": self.index,
            "label": self.label,
            "label_source": self.label_source,
            "terms": list(self.terms),
            "score": self.score,
            "statistics": statistics,
            "histogram": None if histogram is None else dict(vars(histogram)),
            "coactivating": [dict(vars(one)) for one in self.coactivating],
            "rivals": [dict(vars(one)) for one in self.rivals],
            "nearest": [dict(vars(one)) for one in self.nearest],
            "safety_class": self.safety_class,
        }

    def _view(self, budget: int = NOTEBOOK_BYTES) -> str:
        return feature_view(self._facts, self._seen, self._icon, budget=budget)

    def __eq__(self, other: object) -> bool:
        return self._facts == other._facts if isinstance(other, FeatureBase) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.index, self.label))

    def __repr__(self) -> str:
        label = f" {self.label!r}" if self.label else ""
        return f"<{type(self).__name__} #{self.index}{label}, fires on {self.statistics.firing_share:.1%}>"


class FeatureListBase(list[F]):
    """Features; a list that a notebook shows as cards with pictures.

    Attributes:
        total: how many there are in all, of which these were asked for.
    """

    def __init__(self, features: Iterable[F] = (), total: int | None = None) -> None:
        super().__init__(features)
        self.total = len(self) if total is None else total

    @overload
    def __getitem__(self, position: SupportsIndex) -> F: ...
    @overload
    def __getitem__(self, position: slice) -> Self: ...
    def __getitem__(self, position: SupportsIndex | slice) -> F | Self:
        if isinstance(position, slice):
            return type(self)(super().__getitem__(position))
        return super().__getitem__(position)

    def _view(self, budget: int = NOTEBOOK_BYTES) -> str:
        seen = {feature.index: feature._seen for feature in self if feature._seen}
        return features_view([feature._facts for feature in self], seen, total=self.total, budget=budget)


def fetch_pictures(features: Iterable[FeatureBase[Any]], limit: int, seconds: float) -> Operation[None]:
    """Fetches the pictures that a view shows of features that have none yet, as far as they come within ``seconds``."""
    missing = [feature for feature in features if feature._seen is None and feature.statistics.alive][:MOST_CARDS]
    if missing:
        found = yield from examples_of_many(
            missing[0]._context, [feature.index for feature in missing], limit=limit, seconds=seconds
        )
        for feature in missing:
            feature._seen = found.get(feature.index)
