"""The asyncio client's view of the feature library: each call runs one operation of the shared core.

Knows nothing of what the operations do; a test holds it against :mod:`faceteer._client_features`.
"""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator, Awaitable, Iterable
from typing import TYPE_CHECKING, Any

from PIL import Image

from faceteer._async_driver import AsyncDriver
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

if TYPE_CHECKING:
    from faceteer._async_client import AsyncPhoto


class AsyncFeature(FeatureBase[AsyncDriver]):
    """A feature as the library knows it. Made by :attr:`Client.features`."""

    async def examples(self, limit: int | None = 12, *, timeout: float | None = None) -> list[FeatureExample]:
        """Pictures on which it fires, strongest first; None for all that are kept."""
        return await self._driver.run(feature_examples(self._context, self.index, limit=limit, timeout=timeout))

    async def icon(self, *, timeout: float | None = None) -> Image.Image:
        """What turning it up causes; ``.info["strengths"]``, left to right. IconNotMadeError where there is none."""
        return await self._driver.run(feature_icon(self._context, self.index, timeout=timeout))

    async def similar(self, limit: int | None = 10, *, timeout: float | None = None) -> list[AsyncFeature]:
        """Features like this one, best first."""
        nothing = feature_filter(
            alive=None,
            labelled=None,
            min_firing_share=None,
            max_firing_share=None,
            min_detection_score=None,
            label_sources=None,
        )
        found = await self._driver.run(
            search_features(self._context, self.index, nothing, limit=limit, timeout=timeout)
        )
        return [AsyncFeature(self._driver, self._context, facts) for facts in found]


class AsyncFeatureLibrary(Bound[AsyncDriver]):
    """What each feature means. ``await library[412]`` and ``await library["night"]`` look one up."""

    def __getitem__(self, feature: FeatureKey) -> Awaitable[AsyncFeature]:
        return self.get(feature)

    async def get(self, feature: FeatureKey, *, timeout: float | None = None) -> AsyncFeature:
        """One feature by index or label, whole. UnknownFeatureError with the nearest labels."""
        return self._feature(await self._driver.run(get_feature(self._context, feature, timeout=timeout)))

    async def many(
        self, features: Iterable[FeatureKey], *, timeout: float | None = None
    ) -> builtins.list[AsyncFeature]:
        """Many features in the order asked for, without histogram and relatives."""
        return [
            self._feature(facts)
            for facts in await self._driver.run(get_features(self._context, features, timeout=timeout))
        ]

    async def search(
        self,
        query: str | AsyncPhoto | AsyncFeature,
        *,
        limit: int | None = 20,
        alive: bool | None = None,
        labelled: bool | None = None,
        min_firing_share: float | None = None,
        max_firing_share: float | None = None,
        min_detection_score: float | None = None,
        label_sources: Iterable[LabelSource] | None = None,
        timeout: float | None = None,
    ) -> builtins.list[AsyncFeature]:
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
        found = await self._driver.run(search_features(self._context, what, filter, limit=limit, timeout=timeout))
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
    ) -> AsyncIterator[AsyncFeature]:
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

    async def label(
        self, feature: FeatureKey, label: str, *, author: str = "", timeout: float | None = None
    ) -> AsyncFeature:
        """Records a person's label, which wins over every automatic one; an empty label takes it back."""
        return self._feature(
            await self._driver.run(set_label(self._context, feature, label, author=author, timeout=timeout))
        )

    def _feature(self, facts: FeatureFacts) -> AsyncFeature:
        return AsyncFeature(self._driver, self._context, facts)
