"""LibraryService over gRPC: messages to questions, rows to messages.

Knows nothing of SQL. Every question runs in a thread, since SQLite blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from faceteer.v1 import edits_pb2, library_pb2, library_pb2_grpc
from faceteer_runtime.errors import BatchTooLarge, FaceteerError, IconNotMade, InvalidField, NotInBundle, UnknownFeature
from faceteer_runtime.execution import execution
from faceteer_runtime.icons import TEMPLATE
from faceteer_runtime.request import request_context
from faceteer_runtime.tensors import to_array

from faceteer_library.gate import Gate, Sight
from faceteer_library.messages import ORDERS, SELECTIONS, to_activations, to_feature, to_filter, to_related
from faceteer_library.pages import next_token, read_page
from faceteer_library.people import People
from faceteer_library.store import Example, Hit, Row, Store

_MOST_FEATURES, _LONGEST_LABEL, _LONGEST_WORDS = 1000, 120, 1000


class LibraryServicer(library_pb2_grpc.LibraryServiceServicer):
    """See protos/faceteer/v1/library.proto."""

    def __init__(self, store: Store, people: People, gate: Gate, *, revision: str, bundle: str) -> None:
        self._store = store
        self._people = people
        self._gate = gate
        self._revision = revision
        self._bundle = bundle

    async def GetLibrary(self, request: library_pb2.GetLibraryRequest, context: Any) -> library_pb2.GetLibraryResponse:
        meta = self._store.meta
        facts = await asyncio.to_thread(self._store.facts, self._sight())
        return library_pb2.GetLibraryResponse(
            revision=self._revision,
            bundle=self._bundle,
            sae_revision=meta.get("sae_revision", ""),
            corpus=meta.get("corpus", ""),
            n_pictures=int(meta.get("n_pictures", "0")),
            n_features=facts.n_features,
            n_alive=facts.n_alive,
            n_labelled=facts.n_labelled,
            safety_classes=facts.safety_classes,
            searches_meaning=self._store.searches_meaning,
            created=meta.get("created", ""),
        )

    async def GetFeature(self, request: library_pb2.GetFeatureRequest, context: Any) -> library_pb2.GetFeatureResponse:
        sight = self._sight()

        def ask() -> library_pb2.GetFeatureResponse:
            row = self._find(request.feature, "feature", sight)
            edges, counts = self._store.histogram(row.index)
            detail = library_pb2.FeatureDetail(
                histogram_edges=edges.tolist(),
                histogram_counts=counts.tolist(),
                coactivating=to_related(self._store.relatives(row.index, "coactivating", sight)),
                rivals=to_related(self._store.relatives(row.index, "rivals", sight)),
                nearest=to_related(self._store.relatives(row.index, "nearest", sight)),
            )
            return library_pb2.GetFeatureResponse(feature=to_feature(row), detail=detail)

        return self._ran(await asyncio.to_thread(ask))

    async def BatchGetFeatures(
        self, request: library_pb2.BatchGetFeaturesRequest, context: Any
    ) -> library_pb2.BatchGetFeaturesResponse:
        if not request.features:
            raise InvalidField("features", "is empty; give at least one")
        if len(request.features) > _MOST_FEATURES:
            raise BatchTooLarge("features", len(request.features), _MOST_FEATURES)

        sight = self._sight()

        def ask() -> library_pb2.BatchGetFeaturesResponse:
            rows = (self._find(reference, f"features[{at}]", sight) for at, reference in enumerate(request.features))
            return library_pb2.BatchGetFeaturesResponse(features=[to_feature(row) for row in rows])

        return self._ran(await asyncio.to_thread(ask))

    async def ListFeatures(
        self, request: library_pb2.ListFeaturesRequest, context: Any
    ) -> library_pb2.ListFeaturesResponse:
        order = ORDERS.get(request.order)
        if order is None:
            raise InvalidField("order", f"{request.order} is not an order of the contract")
        page = read_page(request, default=50, most=1000)
        chosen, sight = to_filter(request.filter), self._sight_of(request.filter)
        rows, total = await asyncio.to_thread(self._store.list, chosen, order, page.offset, page.size, sight)
        return self._ran(
            library_pb2.ListFeaturesResponse(
                features=[to_feature(row) for row in rows],
                next_page_token=next_token(request, page, total),
                total_size=total,
            )
        )

    async def SearchFeatures(
        self, request: library_pb2.SearchFeaturesRequest, context: Any
    ) -> library_pb2.SearchFeaturesResponse:
        page = read_page(request, default=50, most=1000)
        chosen, sight = to_filter(request.filter), self._sight_of(request.filter)

        def ask() -> tuple[list[Hit], int]:
            match request.WhichOneof("query"):
                case "words":
                    if len(request.words) > _LONGEST_WORDS:
                        raise InvalidField("words", f"must be at most {_LONGEST_WORDS} characters")
                    embeds = self._words_embeds(request)
                    return self._store.search(request.words, chosen, page.offset, page.size, embeds, sight)
                case "similar_to":
                    row = self._find(request.similar_to, "similar_to", self._sight())
                    return self._store.similar(row.index, chosen, page.offset, page.size, sight)
                case "activations":
                    indices, activations = to_activations(request.activations)
                    return self._store.firing(indices, activations, chosen, page.offset, page.size, sight)
                case "picture":
                    raise NotInBundle(
                        "library",
                        "the library alone cannot read pictures; ask StudioService's address, or give activations",
                    )
            raise InvalidField("query", "is missing; give words, picture, similar_to or activations")

        hits, total = await asyncio.to_thread(ask)
        return self._ran(
            library_pb2.SearchFeaturesResponse(
                hits=[library_pb2.FeatureHit(feature=to_feature(hit.row), score=hit.score) for hit in hits],
                next_page_token=next_token(request, page, total),
                total_size=total,
            )
        )

    async def ListFeatureExamples(
        self, request: library_pb2.ListFeatureExamplesRequest, context: Any
    ) -> library_pb2.ListFeatureExamplesResponse:
        page = read_page(request, default=12, most=100)
        selection = SELECTIONS.get(request.selection)
        if selection is None:
            raise InvalidField("selection", f"{request.selection} is not a selection of the contract")
        sight = self._sight()

        def ask() -> tuple[Sequence[Example], int]:
            row = self._find(request.feature, "feature", sight)
            return self._store.examples(row.index, page.offset, page.size, selection)

        rows, total = await asyncio.to_thread(ask)
        return self._ran(
            library_pb2.ListFeatureExamplesResponse(
                examples=[library_pb2.FeatureExample(**row._asdict()) for row in rows],
                next_page_token=next_token(request, page, total),
                total_size=total,
            )
        )

    async def GetFeatureIcon(
        self, request: library_pb2.GetFeatureIconRequest, context: Any
    ) -> library_pb2.GetFeatureIconResponse:
        sight = self._sight()

        def ask() -> library_pb2.GetFeatureIconResponse:
            row = self._find(request.feature, "feature", sight)
            icon = self._store.icon(row.index)
            if icon is None:
                error = IconNotMade(row.index)
                if row.p99 > 0 and TEMPLATE in self._store.meta:
                    # What whoever can draw needs; a feature that never fired has no strengths to draw.
                    error.metadata[TEMPLATE] = self._store.meta[TEMPLATE]
                raise error
            return library_pb2.GetFeatureIconResponse(icon=icon[0], strengths=icon[1])

        return self._ran(await asyncio.to_thread(ask))

    async def SetFeatureLabel(
        self, request: library_pb2.SetFeatureLabelRequest, context: Any
    ) -> library_pb2.SetFeatureLabelResponse:
        label, author = request.label.strip(), request.author.strip()
        for name, text in (("label", label), ("author", author)):
            if len(text) > _LONGEST_LABEL or not text.isprintable():
                raise InvalidField(name, f"must be one line of at most {_LONGEST_LABEL} printable characters")

        sight = self._sight()

        def change() -> library_pb2.SetFeatureLabelResponse:
            row = self._find(request.feature, "feature", sight)
            try:
                self._people.set(row.index, label, author)
            except OSError as error:
                raise NotWritable(str(error)) from error
            return library_pb2.SetFeatureLabelResponse(feature=to_feature(self._store.get(row.index, sight)))

        return await asyncio.to_thread(change)

    def _find(self, reference: edits_pb2.FeatureRef, field: str, sight: Sight) -> Row:
        kind = reference.WhichOneof("feature")
        if kind is None or (kind == "label" and not reference.label.strip()):
            raise InvalidField(field, "is missing; give index or label")
        try:
            if kind == "index":
                return self._store.get(reference.index, sight)
            return self._store.resolve(reference.label, sight)
        except UnknownFeature as error:
            error.field = f"{field}.{kind}"
            raise

    def _words_embeds(self, request: library_pb2.SearchFeaturesRequest) -> np.ndarray | None:
        if not request.HasField("words_embeds") or not self._store.searches_meaning:
            return None
        embeds = to_array(request.words_embeds, field="words_embeds", shape=(self._store.embed_dim,))
        if not embeds.any():
            raise InvalidField("words_embeds.data", "must not be all zero")
        return embeds

    def _sight(self) -> Sight:
        """For features that the call names."""
        return self._gate.sight(request_context().access_key)

    def _sight_of(self, wanted: library_pb2.FeatureFilter) -> Sight:
        """For a list or search."""
        return self._gate.sight_of(request_context().access_key, wanted.include_safety_classes)

    def _ran(self, answer: Any) -> Any:
        answer.execution.CopyFrom(execution(self._revision))
        return answer


class NotWritable(FaceteerError):
    """People's labels cannot be kept where the settings say."""

    status = "FAILED_PRECONDITION"
    reason = "NOT_IN_BUNDLE"

    def __init__(self, fault: str) -> None:
        super().__init__(
            f"labels cannot be written ({fault}); let FACETEER_LIBRARY_LABELS_PATH name a file in a writable directory"
        )
