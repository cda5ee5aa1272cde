"""The asyncio client's view of the feature library: each call runs one operation of the shared core.

Knows nothing of what the operations do; a test holds it against :mod:`faceteer._client_features`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from faceteer._async_driver import AsyncDriver
from faceteer._bases import Bound, PhotoBase
from faceteer._edits import FeatureKey
from faceteer._facts import FeatureFacts, LibraryFacts
from faceteer._feature_bases import (
    FILE_SECONDS,
    FeatureBase,
    FeatureExamples,
    FeatureListBase,
    fetch_pictures,
)
from faceteer._feature_views import CARD_PICTURES, FEATURE_PICTURES
from faceteer._html import FILE_BYTES, save_page
from faceteer._icons import FeatureIcon
from faceteer._library import (
    ExampleSelection,
    FeatureFilters,
    FeatureOrder,
    Found,
    feature_examples,
    feature_filter,
    feature_icon,
    get_feature,
    get_features,
    library_facts,
    list_features,
    search_features,
    set_label,
)

if TYPE_CHECKING:
    from faceteer._async_client import AsyncPhoto


class AsyncFeature(FeatureBase[AsyncDriver]):
    """A feature as the library knows it. Made by :attr:`Client.features`."""

    async def examples(
        self, limit: int | None = 12, *, selection: ExampleSelection = "strongest", timeout: float | None = None
    ) -> FeatureExamples:
        """Pictures on which it fires, strongest first; None for all that are kept.

        Args:
            limit: how many at most.
            selection: the "strongest", or some drawn from each of the "quantiles" of its activation: what it is like
                where it is not at its strongest.
            timeout: seconds.
        """
        operation = feature_examples(self._context, self.index, limit=limit, selection=selection, timeout=timeout)
        found = FeatureExamples(await self._driver.run(operation))
        if selection == "strongest":
            self._seen = found
        return found

    async def icon(self, *, timeout: float | None = None) -> FeatureIcon:
        """What turning it up causes. Where the library has none the server may draw it, which takes a while.

        Raises:
            IconNotMadeError: there is none, and none can be drawn.
        """
        self._icon = await self._driver.run(feature_icon(self._context, self.index, timeout=timeout))
        return self._icon

    async def similar(self, limit: int | None = 10, *, timeout: float | None = None) -> AsyncFeatureList:
        """Features like this one, best first."""
        operation = search_features(self._context, self.index, feature_filter({}), limit=limit, timeout=timeout)
        return _listed(self, await self._driver.run(operation))

    async def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the feature with its pictures as a page of its own, and returns the path."""
        await self._driver.run(fetch_pictures([self], FEATURE_PICTURES, FILE_SECONDS))
        return save_page(path, self.name, self._view(FILE_BYTES))

    def _repr_html_(self) -> str:
        # A notebook asks without awaiting: what was fetched already is shown.
        return self._view()


class AsyncFeatureList(FeatureListBase[AsyncFeature]):
    """Features, as a list that a notebook shows as cards with pictures."""

    async def save_html(self, path: str | os.PathLike[str], *, title: str = "Features") -> Path:
        """Writes the features with their pictures as a page of its own, and returns the path."""
        if self:
            await self[0]._driver.run(fetch_pictures(self, CARD_PICTURES, FILE_SECONDS))
        return save_page(path, title, self._view(FILE_BYTES))

    async def fetch_pictures(self, *, timeout: float = FILE_SECONDS) -> None:
        """Fetches the pictures that a view of the list shows, as far as they come within ``timeout`` seconds."""
        if self:
            await self[0]._driver.run(fetch_pictures(self, CARD_PICTURES, timeout))

    def _repr_html_(self) -> str:
        # As for one feature.
        return self._view()


class AsyncFeatureLibrary(Bound[AsyncDriver]):
    """What each feature means. ``await library[412]`` and ``await library["night"]`` look one up."""

    def __getitem__(self, feature: FeatureKey) -> Awaitable[AsyncFeature]:
        return self.get(feature)

    async def info(self, *, timeout: float | None = None) -> LibraryFacts:
        """What the library covers."""
        return await self._driver.run(library_facts(self._context, timeout=timeout))

    async def get(self, feature: FeatureKey, *, timeout: float | None = None) -> AsyncFeature:
        """One feature by index or label, whole. UnknownFeatureError with the nearest labels."""
        return self._feature(await self._driver.run(get_feature(self._context, feature, timeout=timeout)))

    async def many(self, features: Iterable[FeatureKey], *, timeout: float | None = None) -> AsyncFeatureList:
        """Many features in the order asked for, without histogram and relatives."""
        found = await self._driver.run(get_features(self._context, features, timeout=timeout))
        return AsyncFeatureList(map(self._feature, found))

    async def search(
        self,
        query: str | AsyncPhoto | AsyncFeature,
        *,
        limit: int | None = 20,
        timeout: float | None = None,
        **filters: Unpack[FeatureFilters],
    ) -> AsyncFeatureList:
        """Features by words, by a photo, or like another feature; best first, with ``.score``.

        Args:
            query: words of labels, the last one may be incomplete (labels that mean the same are found too where
                :meth:`info` says so); a photo, for the features that fire on it; or a feature, for those like it.
            limit: how many at most; None for all.
            timeout: seconds.
            filters: :class:`FeatureFilters`.

        Raises:
            InvalidArgumentError: a filter's value cannot be used, or nothing is searched for.
            PermissionDeniedError: include_safety_classes, and the access key does not allow it.
        """
        what: Any = query
        if isinstance(query, PhotoBase | FeatureBase):
            what = query._opened if isinstance(query, PhotoBase) else query.index
        operation = search_features(self._context, what, feature_filter(filters), limit=limit, timeout=timeout)
        return _listed(self, await self._driver.run(operation))

    def list(
        self,
        *,
        order: FeatureOrder = "index",
        limit: int | None = None,
        timeout: float | None = None,
        **filters: Unpack[FeatureFilters],
    ) -> AsyncIterator[AsyncFeature]:
        """All features that pass the filter, fetched page by page as they are asked for.

        Args:
            order: "index"; by falling "firing_share", "max_activation", "detection_score", "causal_score" or
                "disagreement" of the two scores; or by "label".
            limit: how many at most.
            timeout: a page's, in seconds.
            filters: :class:`FeatureFilters`.
        """
        return self._driver.iterate(
            list_features(
                self._context,
                feature_filter(filters),
                order=order,
                limit=limit,
                make=self._feature,
                timeout=timeout,
            )
        )

    async def label(
        self, feature: FeatureKey, label: str, *, author: str = "", timeout: float | None = None
    ) -> AsyncFeature:
        """Records a person's label, which wins over every automatic one; an empty label takes it back."""
        facts = await self._driver.run(set_label(self._context, feature, label, author=author, timeout=timeout))
        return self._feature(facts)

    def _feature(self, facts: FeatureFacts) -> AsyncFeature:
        return AsyncFeature(self._driver, self._context, facts)


def _listed(by: Bound[AsyncDriver], found: Found) -> AsyncFeatureList:
    features = [AsyncFeature(by._driver, by._context, facts) for facts in found.features]
    return AsyncFeatureList(features, found.total)
