# Generated from faceteer/_async/features.py by clients/python/unasync.py: edit that file, then run `make client`.
"""The feature library: looking features up, searching, examples, icons, labels."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, SupportsIndex, Unpack, overload

from faceteer._errors import FaceteerError, InternalError, NotFoundError, invalid
from faceteer._files import write_atomically
from faceteer._models.edits import FeatureKey, feature_ref
from faceteer._models.features import (
    ORDERS,
    SELECTIONS,
    ExampleSelection,
    FeatureExample,
    FeatureExamples,
    FeatureFacts,
    FeatureFilters,
    FeatureOrder,
    FeatureStatistics,
    LabelSource,
    LibraryFacts,
    RelatedFeature,
    feature_filter,
)
from faceteer._models.icon import FeatureIcon
from faceteer._models.match import FeatureMatch
from faceteer._sync.connection import Connection
from faceteer._sync.photo import Photo
from faceteer._transport.blocking import fetch_for_view, work
from faceteer._transport.methods import (
    BATCH_GET_FEATURES,
    GET_FEATURE,
    GET_FEATURE_ICON,
    GET_LIBRARY,
    LIST_FEATURE_EXAMPLES,
    LIST_FEATURES,
    SEARCH_FEATURES,
    SET_FEATURE_LABEL,
)
from faceteer._transport.retries import Attempts, Retries
from faceteer._views.features import CARD_PICTURES, FEATURE_PICTURES, MOST_CARDS, feature_view, features_view
from faceteer._views.html import NOTEBOOK_SECONDS
from faceteer.v1 import library_pb2

# Seconds that a page may wait for pictures.
FILE_SECONDS = 60.0
_PAGE = 1000
_EXAMPLES_PAGE = 100


class Feature:
    """A feature as the library knows it. Made by :attr:`Client.features`."""

    def __init__(self, connection: Connection, facts: FeatureFacts) -> None:
        self._connection = connection
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
        return self._facts.name

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
        """Features that fire together with it; score is the lift. Empty for a feature from a list."""
        return self._facts.coactivating

    @property
    def rivals(self) -> tuple[RelatedFeature, ...]:
        """Features that rarely or never fire with it; score is the lift. Empty for a feature from a list."""
        return self._facts.rivals

    @property
    def nearest(self) -> tuple[RelatedFeature, ...]:
        """Features with the closest decoder directions; score is the cosine. Empty for a feature from a list."""
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
    def match(self) -> FeatureMatch | None:
        """How a name led to it: the words of the search, or the name that it was asked for by. None otherwise."""
        return self._facts.match

    @property
    def told_apart(self) -> str:
        """Its label, and for one that the label does not mean which one it is: "balloon (2nd of 14)"."""
        return self._facts.told_apart

    @property
    def score(self) -> float | None:
        """How well it fits the search that found it, comparable within that search; None otherwise."""
        return self._facts.score

    def examples(
        self, limit: int | None = 12, *, selection: ExampleSelection = "strongest", timeout: float | None = None
    ) -> FeatureExamples:
        """Pictures on which it fires, strongest first; None for all that are kept.

        Args:
            limit: how many at most.
            selection: the "strongest", or some drawn from each of the "quantiles" of its activation: what it is like
                where it is not at its strongest.
            timeout: seconds.
        """
        if selection not in SELECTIONS:
            raise invalid("selection", f"{selection!r} is unknown; one of {', '.join(SELECTIONS)}")
        attempts = self._connection.attempts(timeout, self._connection.timeouts.query)
        left, token = _limit(limit), ""
        found = FeatureExamples()
        while left > 0:
            request = library_pb2.ListFeatureExamplesRequest(
                feature=feature_ref(self.index),
                page_size=min(_EXAMPLES_PAGE, left),
                page_token=token,
                selection=SELECTIONS[selection],
            )
            answer = self._connection.call(LIST_FEATURE_EXAMPLES, request, attempts)
            found += work(partial(FeatureExamples.from_proto, answer.examples[:left]))
            left, token = left - len(answer.examples), answer.next_page_token
            if not token:
                break
        if selection == "strongest":
            self._seen = found
        return found

    def icon(self, *, timeout: float | None = None) -> FeatureIcon:
        """What turning it up causes. Where the library has none the server may draw it, which takes a while.

        Raises:
            IconNotMadeError: there is none, and none can be drawn.
        """
        attempts = self._connection.attempts(timeout, self._connection.timeouts.render)
        request = library_pb2.GetFeatureIconRequest(feature=feature_ref(self.index))
        answer = self._connection.call(GET_FEATURE_ICON, request, attempts)
        self._icon = work(partial(FeatureIcon.from_proto, answer))
        return self._icon

    def similar(self, limit: int | None = 10, *, timeout: float | None = None) -> FeatureList:
        """Features like this one, best first."""
        return FeatureLibrary(self._connection).search(self, limit=limit, timeout=timeout)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return self._facts.to_dict()

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the feature with its pictures as a page of its own, and returns the path."""
        _fetch_pictures([self], FEATURE_PICTURES, FILE_SECONDS)
        return write_atomically(path, feature_view(self._facts, self._seen, self._icon, page=True).encode())

    def _repr_html_(self) -> str:
        fetch_for_view(lambda: _fetch_pictures([self], FEATURE_PICTURES, NOTEBOOK_SECONDS))
        return feature_view(self._facts, self._seen, self._icon)

    def __eq__(self, other: object) -> bool:
        return self._facts == other._facts if isinstance(other, Feature) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.index, self.label))

    def __repr__(self) -> str:
        label = f" {self.label!r}" if self.label else ""
        return f"<{type(self).__name__} #{self.index}{label}, fires on {self.statistics.firing_share:.1%}>"


class FeatureList(list[Feature]):
    """Features, as a list that a notebook shows as cards with pictures.

    Attributes:
        total: how many there are in all, of which these were asked for.
        suggestions: where words found nothing, labels that are spelt nearly so.
    """

    def __init__(
        self, features: Iterable[Feature] = (), total: int | None = None, suggestions: Iterable[str] = ()
    ) -> None:
        super().__init__(features)
        self.suggestions = tuple(suggestions)
        self.total = len(self) if total is None else total

    @overload
    def __getitem__(self, position: SupportsIndex) -> Feature: ...
    @overload
    def __getitem__(self, position: slice) -> Self: ...
    def __getitem__(self, position: SupportsIndex | slice) -> Feature | Self:
        if isinstance(position, slice):
            return type(self)(super().__getitem__(position))
        return super().__getitem__(position)

    def save_html(self, path: str | os.PathLike[str], *, title: str = "Features") -> Path:
        """Writes the features with their pictures as a page of its own, and returns the path."""
        self.fetch_pictures()
        return write_atomically(path, self._view(title=title, page=True).encode())

    def fetch_pictures(self, *, timeout: float = FILE_SECONDS) -> None:
        """Fetches the pictures that a view of the list shows, as far as they come within ``timeout`` seconds."""
        _fetch_pictures(self, CARD_PICTURES, timeout)

    def _repr_html_(self) -> str:
        fetch_for_view(lambda: self.fetch_pictures(timeout=NOTEBOOK_SECONDS))
        return self._view()

    def _view(self, *, title: str = "Features", page: bool = False) -> str:
        seen = {feature.index: feature._seen for feature in self if feature._seen}
        return features_view([feature._facts for feature in self], seen, total=self.total, title=title, page=page)


def _fetch_pictures(features: Iterable[Feature], limit: int, seconds: float) -> None:
    """Fetches the pictures that a view shows of features that have none yet, as far as they come within ``seconds``.

    Never raises for what a server says: a view without pictures is better than none. Nothing is tried twice, and after
    the first failure that would hit the next feature too, nothing more is asked.
    """
    attempts = Attempts(Retries(attempts=1), seconds)
    missing = [feature for feature in features if feature._seen is None and feature.statistics.alive]
    for feature in missing[:MOST_CARDS]:
        request = library_pb2.ListFeatureExamplesRequest(
            feature=feature_ref(feature.index), page_size=limit, selection=library_pb2.EXAMPLE_SELECTION_STRONGEST
        )
        try:
            answer = feature._connection.call(LIST_FEATURE_EXAMPLES, request, attempts)
            feature._seen = work(partial(FeatureExamples.from_proto, answer.examples[:limit]))
        except (NotFoundError, InternalError):
            continue
        except FaceteerError:
            break


class FeatureLibrary:
    """What each feature means. ``library[412]`` and ``library["night"]`` look one up."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __getitem__(self, feature: FeatureKey) -> Feature:
        return self.get(feature)

    def info(self, *, timeout: float | None = None) -> LibraryFacts:
        """What the library covers."""
        answer = self._connection.call(GET_LIBRARY, library_pb2.GetLibraryRequest(), self._attempts(timeout))
        return LibraryFacts.from_proto(answer)

    def get(self, feature: FeatureKey, *, timeout: float | None = None) -> Feature:
        """One feature by index or label, whole. UnknownFeatureError with the nearest labels."""
        request = library_pb2.GetFeatureRequest(feature=feature_ref(feature))
        answer = self._connection.call(GET_FEATURE, request, self._attempts(timeout))
        match = answer.match if answer.HasField("match") else None
        return self._feature(FeatureFacts.from_proto(answer.feature, answer.detail, match=match))

    def many(self, features: Iterable[FeatureKey], *, timeout: float | None = None) -> FeatureList:
        """Many features in the order asked for, without histogram and relatives."""
        found = self._facts(features, self._attempts(timeout))
        return FeatureList(map(self._feature, found))

    def search(
        self,
        query: str | Photo | Feature,
        *,
        limit: int | None = 20,
        timeout: float | None = None,
        **filters: Unpack[FeatureFilters],
    ) -> FeatureList:
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
        narrowed = feature_filter(filters)
        photos = [query._opened] if isinstance(query, Photo) else []
        attempts = self._attempts(timeout)
        left, token, total = _limit(limit), "", 0
        found: list[FeatureFacts] = []
        suggestions: Sequence[str] = ()

        def request() -> library_pb2.SearchFeaturesRequest:
            message = library_pb2.SearchFeaturesRequest(filter=narrowed, page_size=min(_PAGE, left), page_token=token)
            if isinstance(query, Photo):
                message.picture.CopyFrom(query._opened.embeds_input())
            elif isinstance(query, Feature):
                message.similar_to.CopyFrom(feature_ref(query.index))
            else:
                message.words = query
            return message

        while left > 0:
            answer = self._connection.call_with_photos(SEARCH_FEATURES, request, photos, attempts)
            found += [
                FeatureFacts.from_proto(hit.feature, score=hit.score, match=hit.match) for hit in answer.hits[:left]
            ]
            suggestions = answer.suggestions
            left, token, total = left - len(answer.hits), answer.next_page_token, answer.total_size
            if not token:
                break
        return FeatureList(map(self._feature, found), total, suggestions)

    def list(
        self,
        *,
        order: FeatureOrder = "index",
        limit: int | None = None,
        timeout: float | None = None,
        **filters: Unpack[FeatureFilters],
    ) -> Iterator[Feature]:
        """All features that pass the filter, fetched page by page as they are asked for.

        Args:
            order: "index"; by falling "firing_share", "max_activation", "detection_score", "causal_score" or
                "disagreement" of the two scores; or by "label".
            limit: how many at most.
            timeout: a page's, in seconds.
            filters: :class:`FeatureFilters`.
        """
        return self._pages(feature_filter(filters), order, limit, timeout)

    def label(self, feature: FeatureKey, label: str, *, author: str = "", timeout: float | None = None) -> Feature:
        """Records a person's label, which wins over every automatic one; an empty label takes it back."""
        request = library_pb2.SetFeatureLabelRequest(feature=feature_ref(feature), label=label, author=author)
        # Setting the same label twice is setting it once, so it may be retried like everything that only reads.
        answer = self._connection.call(SET_FEATURE_LABEL, request, self._attempts(timeout))
        return self._feature(FeatureFacts.from_proto(answer.feature))

    def _facts(
        self, features: Iterable[FeatureKey], attempts: Attempts, *, allow_missing: bool = False
    ) -> Sequence[FeatureFacts]:
        refs = [feature_ref(feature) for feature in features]
        found: list[FeatureFacts] = []
        for start in range(0, len(refs), _PAGE):
            batch = refs[start : start + _PAGE]
            request = library_pb2.BatchGetFeaturesRequest(features=batch, allow_missing=allow_missing)
            answer = self._connection.call(BATCH_GET_FEATURES, request, attempts)
            found += map(FeatureFacts.from_proto, answer.features)
        return found

    def _labels(self, indices: Iterable[int], attempts: Attempts) -> dict[int, str]:
        """Labels by index; features that the operator gates, and the caller may not see, are left out."""
        found = self._facts(indices, attempts, allow_missing=True)
        return {feature.index: feature.label for feature in found}

    def _pages(
        self, narrowed: library_pb2.FeatureFilter, order: FeatureOrder, limit: int | None, timeout: float | None
    ) -> Generator[Feature, None, None]:
        if order not in ORDERS:
            raise invalid("order", f"{order!r} is unknown; one of {', '.join(ORDERS)}")
        left = _limit(limit)
        request = library_pb2.ListFeaturesRequest(filter=narrowed, order=ORDERS[order], page_size=min(_PAGE, left))
        while left > 0:
            # Each page has a deadline of its own: whoever iterates may take their time between two.
            answer = self._connection.call(LIST_FEATURES, request, self._attempts(timeout))
            for feature in answer.features[:left]:
                yield self._feature(FeatureFacts.from_proto(feature))
            left -= len(answer.features)
            request.page_token = answer.next_page_token
            if not answer.next_page_token:
                return

    def _attempts(self, timeout: float | None) -> Attempts:
        return self._connection.attempts(timeout, self._connection.timeouts.query)

    def _feature(self, facts: FeatureFacts) -> Feature:
        return Feature(self._connection, facts)


def _limit(limit: int | None) -> int:
    if limit is None:
        return 2**31
    if limit < 1:
        raise invalid("limit", f"{limit} is not positive; pass 1 or more, or None for all")
    return limit
