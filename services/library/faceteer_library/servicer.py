"""LibraryService over gRPC: messages to questions, rows to messages.

Knows nothing of SQL. Every question runs in a thread, since SQLite blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from faceteer.v1 import edits_pb2, execution_pb2, library_pb2, library_pb2_grpc
from faceteer_runtime.errors import BatchTooLarge, FaceteerError, IconNotMade, InvalidField, NotInBundle, UnknownFeature
from faceteer_runtime.execution import execution

from faceteer_library.pages import next_token, read_page
from faceteer_library.people import People
from faceteer_library.store import Filter, Hit, Row, Store

_MOST_FEATURES, _LONGEST_LABEL, _LONGEST_WORDS = 1000, 120, 1000
_SOURCES = {
    "": library_pb2.LABEL_SOURCE_UNSPECIFIED,
    "automatic": library_pb2.LABEL_SOURCE_AUTOMATIC,
    "model": library_pb2.LABEL_SOURCE_MODEL,
    "person": library_pb2.LABEL_SOURCE_PERSON,
}
_ORDERS = {
    library_pb2.FEATURE_ORDER_UNSPECIFIED: "f.feature",
    library_pb2.FEATURE_ORDER_FIRING_SHARE_DESC: "f.firing_share DESC, f.feature",
    library_pb2.FEATURE_ORDER_DETECTION_SCORE_DESC: "f.detection_score DESC NULLS LAST, f.feature",
    library_pb2.FEATURE_ORDER_MAX_ACTIVATION_DESC: "f.max DESC, f.feature",
    # Those without a label last.
    library_pb2.FEATURE_ORDER_LABEL: "shown = '', lower(shown), f.feature",
}


class LibraryServicer(library_pb2_grpc.LibraryServiceServicer):
    """See protos/faceteer/v1/library.proto."""

    def __init__(self, store: Store, people: People, revision: str) -> None:
        self._store = store
        self._people = people
        self._revision = revision

    async def GetFeature(self, request: library_pb2.GetFeatureRequest, context: Any) -> library_pb2.GetFeatureResponse:
        def ask() -> library_pb2.GetFeatureResponse:
            row = self._find(request.feature, "feature")
            edges, counts = self._store.histogram(row.index)
            detail = library_pb2.FeatureDetail(
                histogram_edges=edges.tolist(),
                histogram_counts=counts.tolist(),
                coactivating=_related(self._store.relatives(row.index, "coactivating")),
                rivals=_related(self._store.relatives(row.index, "rivals")),
                nearest=_related(self._store.relatives(row.index, "nearest")),
            )
            return library_pb2.GetFeatureResponse(feature=_feature(row), detail=detail)

        return self._ran(await asyncio.to_thread(ask))

    async def BatchGetFeatures(
        self, request: library_pb2.BatchGetFeaturesRequest, context: Any
    ) -> library_pb2.BatchGetFeaturesResponse:
        if not request.features:
            raise InvalidField("features", "is empty; give at least one")
        if len(request.features) > _MOST_FEATURES:
            raise BatchTooLarge("features", len(request.features), _MOST_FEATURES)

        def ask() -> library_pb2.BatchGetFeaturesResponse:
            rows = (self._find(reference, f"features[{at}]") for at, reference in enumerate(request.features))
            return library_pb2.BatchGetFeaturesResponse(features=[_feature(row) for row in rows])

        return self._ran(await asyncio.to_thread(ask))

    async def ListFeatures(
        self, request: library_pb2.ListFeaturesRequest, context: Any
    ) -> library_pb2.ListFeaturesResponse:
        order = _ORDERS.get(request.order)
        if order is None:
            raise InvalidField("order", f"{request.order} is not an order of the contract")
        page = read_page(request, default=50, most=1000)
        chosen = _filter(request.filter)
        rows, total = await asyncio.to_thread(self._store.list, chosen, order, page.offset, page.size)
        return self._ran(
            library_pb2.ListFeaturesResponse(
                features=[_feature(row) for row in rows],
                next_page_token=next_token(request, page, total),
                total_size=total,
            )
        )

    async def SearchFeatures(
        self, request: library_pb2.SearchFeaturesRequest, context: Any
    ) -> library_pb2.SearchFeaturesResponse:
        page = read_page(request, default=50, most=1000)
        chosen = _filter(request.filter)

        def ask() -> tuple[list[Hit], int]:
            match request.WhichOneof("query"):
                case "words":
                    if len(request.words) > _LONGEST_WORDS:
                        raise InvalidField("words", f"must be at most {_LONGEST_WORDS} characters")
                    return self._store.search(request.words, chosen, page.offset, page.size)
                case "similar_to":
                    row = self._find(request.similar_to, "similar_to")
                    return self._store.similar(row.index, chosen, page.offset, page.size)
                case "picture":
                    raise NotInBundle(
                        "library", "this library cannot be searched by picture; open the picture to see its features"
                    )
            raise InvalidField("query", "is missing; give words or similar_to")

        hits, total = await asyncio.to_thread(ask)
        return self._ran(
            library_pb2.SearchFeaturesResponse(
                hits=[library_pb2.FeatureHit(feature=_feature(hit.row), score=hit.score) for hit in hits],
                next_page_token=next_token(request, page, total),
                total_size=total,
            )
        )

    async def ListFeatureExamples(
        self, request: library_pb2.ListFeatureExamplesRequest, context: Any
    ) -> library_pb2.ListFeatureExamplesResponse:
        page = read_page(request, default=12, most=100)

        def ask() -> tuple[list[tuple[str, float, bytes, str]], int]:
            return self._store.examples(self._find(request.feature, "feature").index, page.offset, page.size)

        rows, total = await asyncio.to_thread(ask)
        return self._ran(
            library_pb2.ListFeatureExamplesResponse(
                examples=[
                    library_pb2.FeatureExample(picture=picture, activation=activation, thumbnail=webp, caption=caption)
                    for picture, activation, webp, caption in rows
                ],
                next_page_token=next_token(request, page, total),
                total_size=total,
            )
        )

    async def GetFeatureIcon(
        self, request: library_pb2.GetFeatureIconRequest, context: Any
    ) -> library_pb2.GetFeatureIconResponse:
        def ask() -> library_pb2.GetFeatureIconResponse:
            row = self._find(request.feature, "feature")
            icon = self._store.icon(row.index)
            if icon is None:
                raise IconNotMade(row.index)
            return library_pb2.GetFeatureIconResponse(icon=icon[0], strengths=icon[1])

        return self._ran(await asyncio.to_thread(ask))

    async def SetFeatureLabel(
        self, request: library_pb2.SetFeatureLabelRequest, context: Any
    ) -> library_pb2.SetFeatureLabelResponse:
        label, author = request.label.strip(), request.author.strip()
        for name, text in (("label", label), ("author", author)):
            if len(text) > _LONGEST_LABEL or not text.isprintable():
                raise InvalidField(name, f"must be one line of at most {_LONGEST_LABEL} printable characters")

        def change() -> library_pb2.SetFeatureLabelResponse:
            row = self._find(request.feature, "feature")
            try:
                self._people.set(row.index, label, author)
            except OSError as error:
                raise NotWritable(str(error)) from error
            return library_pb2.SetFeatureLabelResponse(feature=_feature(self._store.get(row.index)))

        return await asyncio.to_thread(change)

    def _find(self, reference: edits_pb2.FeatureRef, field: str) -> Row:
        kind = reference.WhichOneof("feature")
        if kind is None or (kind == "label" and not reference.label.strip()):
            raise InvalidField(field, "is missing; give index or label")
        try:
            return self._store.get(reference.index) if kind == "index" else self._store.resolve(reference.label)
        except UnknownFeature as error:
            error.field = f"{field}.{kind}"
            raise

    def _ran(self, answer: Any) -> Any:
        answer.execution.CopyFrom(self._execution())
        return answer

    def _execution(self) -> execution_pb2.Execution:
        return execution(self._revision)


class NotWritable(FaceteerError):
    """People's labels cannot be kept where the settings say."""

    status = "FAILED_PRECONDITION"
    reason = "NOT_IN_BUNDLE"

    def __init__(self, fault: str) -> None:
        super().__init__(
            f"labels cannot be written ({fault}); let FACETEER_LIBRARY_LABELS_PATH name a file in a writable directory"
        )


def _filter(wanted: library_pb2.FeatureFilter) -> Filter:
    chosen = Filter()
    if wanted.HasField("alive"):
        chosen.add("f.firing_share > 0" if wanted.alive else "f.firing_share = 0")
    if wanted.HasField("labelled"):
        chosen.add("COALESCE(p.label, f.label) <> ''" if wanted.labelled else "COALESCE(p.label, f.label) = ''")
    for name, condition in (
        ("min_firing_share", "f.firing_share >= ?"),
        ("max_firing_share", "f.firing_share <= ?"),
        ("min_detection_score", "f.detection_score >= ?"),
    ):
        if wanted.HasField(name):
            value = getattr(wanted, name)
            if value != value:
                raise InvalidField(f"filter.{name}", "must be a number")
            chosen.add(condition, value)
    if wanted.label_sources:
        names = {number: name for name, number in _SOURCES.items()}
        for at, source in enumerate(wanted.label_sources):
            if source not in names:
                raise InvalidField(f"filter.label_sources[{at}]", f"{source} is not a label source of the contract")
        places = ", ".join("?" * len(wanted.label_sources))
        shown = "CASE WHEN p.label IS NULL THEN f.label_source ELSE 'person' END"
        chosen.add(f"{shown} IN ({places})", *(names[source] for source in wanted.label_sources))
    return chosen


def _feature(row: Row) -> library_pb2.Feature:
    return library_pb2.Feature(
        index=row.index,
        label=row.label,
        label_source=_SOURCES[row.source],
        alive=row.firing_share > 0,
        firing_share=row.firing_share,
        mean_activation=row.mean,
        p50=row.p50,
        p99=row.p99,
        max_activation=row.max,
        detection_score=row.detection_score,
        causal_score=row.causal_score,
        safety_class=row.safety_class,
    )


def _related(rows: Iterable[Sequence[Any]]) -> list[library_pb2.RelatedFeature]:
    return [library_pb2.RelatedFeature(index=index, label=label, score=score) for index, label, score in rows]
