"""LibraryService over gRPC: messages to questions, rows to messages. Every question runs on a thread: SQLite blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from faceteer.v1 import edits_pb2, library_pb2, library_pb2_grpc, tensor_pb2
from faceteer_runtime.errors import InvalidField, NotInBundle
from faceteer_runtime.execution import execution
from faceteer_runtime.request import request_context
from faceteer_runtime.tensors import to_array, to_tensor

from faceteer_library.application import Criteria, Library
from faceteer_library.messages import (
    ORDERS,
    SELECTIONS,
    to_activations,
    to_feature,
    to_filter,
    to_match,
    to_reference,
    to_related,
)
from faceteer_library.pages import Page, next_token, read_page
from faceteer_library.store import Hit


class LibraryServicer(library_pb2_grpc.LibraryServiceServicer):
    """See protos/faceteer/v1/library.proto."""

    def __init__(self, library: Library, *, revision: str, bundle: str) -> None:
        self._library = library
        self._revision = revision
        self._bundle = bundle

    async def GetLibrary(self, request: library_pb2.GetLibraryRequest, context: Any) -> library_pb2.GetLibraryResponse:
        meta = self._library.meta
        facts = await asyncio.to_thread(self._library.facts, _key())
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
            searches_meaning=self._library.searches_meaning,
            created=meta.get("created", ""),
        )

    async def GetFeature(self, request: library_pb2.GetFeatureRequest, context: Any) -> library_pb2.GetFeatureResponse:
        found = await asyncio.to_thread(self._library.feature, to_reference(request.feature, "feature"), _key())
        detail = library_pb2.FeatureDetail(
            histogram_edges=found.histogram_edges.tolist(),
            histogram_counts=found.histogram_counts.tolist(),
            **{relation: to_related(rows) for relation, rows in found.relatives.items()},
        )
        return library_pb2.GetFeatureResponse(
            feature=to_feature(found.row), detail=detail, execution=self._ran(), match=to_match(found.match)
        )

    async def BatchGetFeatures(
        self, request: library_pb2.BatchGetFeaturesRequest, context: Any
    ) -> library_pb2.BatchGetFeaturesResponse:
        references = [to_reference(each, f"features[{at}]") for at, each in enumerate(request.features)]
        found, missing = await asyncio.to_thread(self._library.features, references, request.allow_missing, _key())
        return library_pb2.BatchGetFeaturesResponse(
            features=[to_feature(one.row) for one in found],
            missing=missing,
            execution=self._ran(),
            matches=[to_match(one.match) or edits_pb2.FeatureMatch() for one in found],
        )

    async def ListFeatures(
        self, request: library_pb2.ListFeaturesRequest, context: Any
    ) -> library_pb2.ListFeaturesResponse:
        order = ORDERS.get(request.order)
        if order is None:
            raise InvalidField("order", f"{request.order} is not an order of the contract")
        page = read_page(request, default=50, most=1000)
        rows, total = await asyncio.to_thread(self._library.list, _criteria(request.filter), order, page)
        return library_pb2.ListFeaturesResponse(
            features=[to_feature(row) for row in rows],
            next_page_token=next_token(request, page, total),
            total_size=total,
            execution=self._ran(),
        )

    async def SearchFeatures(
        self, request: library_pb2.SearchFeaturesRequest, context: Any
    ) -> library_pb2.SearchFeaturesResponse:
        page = read_page(request, default=50, most=1000)
        criteria = _criteria(request.filter)
        hits, total = await self._search(request, criteria, page)
        suggestions: Sequence[str] = ()
        if not total and request.words.strip():
            suggestions = await asyncio.to_thread(self._library.nearly_spelt, request.words, criteria)
        return library_pb2.SearchFeaturesResponse(
            hits=[
                library_pb2.FeatureHit(feature=to_feature(hit.row), score=hit.score, match=to_match(hit.match))
                for hit in hits
            ],
            suggestions=suggestions,
            next_page_token=next_token(request, page, total),
            total_size=total,
            execution=self._ran(),
        )

    async def _search(
        self, request: library_pb2.SearchFeaturesRequest, criteria: Criteria, page: Page
    ) -> tuple[Sequence[Hit], int]:
        library = self._library
        match request.WhichOneof("query"):
            case "words":
                embeds = None
                if request.HasField("words_embeds") and library.searches_meaning:
                    embeds = to_array(request.words_embeds, field="words_embeds", shape=(library.embed_dim,))
                return await asyncio.to_thread(library.search, request.words, embeds, criteria, page)
            case "similar_to":
                reference = to_reference(request.similar_to, "similar_to")
                return await asyncio.to_thread(library.similar, reference, criteria, page)
            case "activations":
                return await asyncio.to_thread(library.firing, *to_activations(request.activations), criteria, page)
            case "picture":
                raise NotInBundle(
                    "library",
                    "the library alone cannot read pictures; ask StudioService's address, or give activations",
                )
        raise InvalidField("query", "is missing; give words, picture, similar_to or activations")

    async def ListFeatureExamples(
        self, request: library_pb2.ListFeatureExamplesRequest, context: Any
    ) -> library_pb2.ListFeatureExamplesResponse:
        page = read_page(request, default=12, most=100)
        selection = SELECTIONS.get(request.selection)
        if selection is None:
            raise InvalidField("selection", f"{request.selection} is not a selection of the contract")
        reference = to_reference(request.feature, "feature")
        rows, total = await asyncio.to_thread(self._library.examples, reference, selection, page, _key())
        return library_pb2.ListFeatureExamplesResponse(
            examples=[library_pb2.FeatureExample(**row._asdict()) for row in rows],
            next_page_token=next_token(request, page, total),
            total_size=total,
            execution=self._ran(),
        )

    async def GetFeatureIcon(
        self, request: library_pb2.GetFeatureIconRequest, context: Any
    ) -> library_pb2.GetFeatureIconResponse:
        icon = await asyncio.to_thread(self._library.icon, to_reference(request.feature, "feature"), _key())
        answer = library_pb2.GetFeatureIconResponse(strengths=icon.strengths, execution=self._ran())
        if icon.webp is not None:
            answer.icon = icon.webp
        if icon.template is not None:
            # Stored as float16, so nothing is lost.
            template = to_tensor(icon.template, tensor_pb2.ELEMENT_TYPE_FLOAT16)
            answer.recipe.CopyFrom(library_pb2.IconRecipe(feature_index=icon.index, template=template))
        return answer

    async def SetFeatureLabel(
        self, request: library_pb2.SetFeatureLabelRequest, context: Any
    ) -> library_pb2.SetFeatureLabelResponse:
        reference = to_reference(request.feature, "feature")
        row = await asyncio.to_thread(self._library.set_label, reference, request.label, request.author, _key())
        return library_pb2.SetFeatureLabelResponse(feature=to_feature(row))

    def _ran(self) -> Any:
        return execution(self._revision)


def _key() -> str:
    return request_context().access_key


def _criteria(wanted: library_pb2.FeatureFilter) -> Criteria:
    return Criteria(to_filter(wanted), tuple(wanted.include_safety_classes), _key())
