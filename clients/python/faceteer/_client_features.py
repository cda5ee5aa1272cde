"""The blocking client's view of the feature library: each call runs one operation of the shared core.

Knows nothing of what the operations do; a test holds it against :mod:`faceteer._async_client_features`.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from PIL import Image

from faceteer._bases import Bound, FeatureBase, PhotoBase
from faceteer._edits import FeatureKey
from faceteer._library import (
    FeatureExample,
    FeatureFacts,
    FeatureOrder,
    LabelSource,
    feature_examples,
    feature_filter,
    feature_icon,
    get_feature,
    get_features,
    list_features,
    search_features,
    set_label,
)
from faceteer._sync_driver import SyncDriver

if TYPE_CHECKING:
    from faceteer._client import Photo


class Feature(FeatureBase[SyncDriver]):
    """A feature as the library knows it. Made by :attr:`Client.features`."""

    def examples(self, limit: int | None = 12, *, timeout: float | None = None) -> list[FeatureExample]:
        """Pictures on which it fires, strongest first; None for all that are kept."""
        return self._driver.run(feature_examples(self._context, self.index, limit=limit, timeout=timeout))

    def icon(self, *, timeout: float | None = None) -> Image.Image:
        """What turning it up causes; ``.info["strengths"]``, left to right. IconNotMadeError where there is none."""
        return self._driver.run(feature_icon(self._context, self.index, timeout=timeout))

    def similar(self, limit: int | None = 10, *, timeout: float | None = None) -> list[Feature]:
        """Features like this one, best first."""
        nothing = feature_filter(
            alive=None,
            labelled=None,
            min_firing_share=None,
            max_firing_share=None,
            min_detection_score=None,
            label_sources=None,
        )
        operation = search_features(self._context, self.index, nothing, limit=limit, timeout=timeout)
        found = self._driver.run(operation)
        return [Feature(self._driver, self._context, facts) for facts in found]


class FeatureLibrary(Bound[SyncDriver]):
    """What each feature means. ``library[412]`` and ``library["night"]`` look one up."""

    def __getitem__(self, feature: FeatureKey) -> Feature:
        return self.get(feature)

    def get(self, feature: FeatureKey, *, timeout: float | None = None) -> Feature:
        """One feature by index or label, whole. UnknownFeatureError with the nearest labels."""
        return self._feature(self._driver.run(get_feature(self._context, feature, timeout=timeout)))

    def many(self, features: Iterable[FeatureKey], *, timeout: float | None = None) -> builtins.list[Feature]:
        """Many features in the order asked for, without histogram and relatives."""
        return [
            self._feature(facts) for facts in self._driver.run(get_features(self._context, features, timeout=timeout))
        ]

    def search(
        self,
        query: str | Photo | Feature,
        *,
        limit: int | None = 20,
        alive: bool | None = None,
        labelled: bool | None = None,
        min_firing_share: float | None = None,
        max_firing_share: float | None = None,
        min_detection_score: float | None = None,
        label_sources: Iterable[LabelSource] | None = None,
        timeout: float | None = None,
    ) -> builtins.list[Feature]:
        """Features by the words of their labels, by a photo, or like another feature; best first, with ``.score``."""
        filter = feature_filter(
            alive=alive,
            labelled=labelled,
            min_firing_share=min_firing_share,
            max_firing_share=max_firing_share,
            min_detection_score=min_detection_score,
            label_sources=label_sources,
        )
        what: Any = query
        if isinstance(query, PhotoBase | FeatureBase):
            what = query._opened if isinstance(query, PhotoBase) else query.index
        found = self._driver.run(search_features(self._context, what, filter, limit=limit, timeout=timeout))
        return [self._feature(facts) for facts in found]

    def list(
        self,
        *,
        order: FeatureOrder = "index",
        limit: int | None = None,
        alive: bool | None = None,
        labelled: bool | None = None,
        min_firing_share: float | None = None,
        max_firing_share: float | None = None,
        min_detection_score: float | None = None,
        label_sources: Iterable[LabelSource] | None = None,
        timeout: float | None = None,
    ) -> Iterator[Feature]:
        """All features that pass the filter, fetched page by page as they are asked for; ``timeout`` is a page's."""
        filter = feature_filter(
            alive=alive,
            labelled=labelled,
            min_firing_share=min_firing_share,
            max_firing_share=max_firing_share,
            min_detection_score=min_detection_score,
            label_sources=label_sources,
        )
        return self._driver.iterate(
            list_features(self._context, filter, order=order, limit=limit, make=self._feature, timeout=timeout)
        )

    def label(self, feature: FeatureKey, label: str, *, author: str = "", timeout: float | None = None) -> Feature:
        """Records a person's label, which wins over every automatic one; an empty label takes it back."""
        return self._feature(self._driver.run(set_label(self._context, feature, label, author=author, timeout=timeout)))

    def _feature(self, facts: FeatureFacts) -> Feature:
        return Feature(self._driver, self._context, facts)
