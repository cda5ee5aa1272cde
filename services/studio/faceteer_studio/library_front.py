"""What LibraryService can do only with the other services' help: search by picture and by meaning, icons on demand.

Knows nothing of SQL or safety classes: every call goes to the library, which decides what its caller sees. Calls that
need no help pass by this front untouched.
"""

from __future__ import annotations

import logging
from typing import Any

import grpc
from faceteer.v1 import encoder_pb2, library_pb2, sae_pb2, tensor_pb2
from faceteer_runtime.cache import Cache
from faceteer_runtime.errors import FaceteerError, InvalidField
from faceteer_runtime.execution import execution
from faceteer_runtime.icons import STRENGTHS, TEMPLATE, unpack_template

from faceteer_studio.edit_image import Remaining
from faceteer_studio.icons import Icons
from faceteer_studio.identity import Identity
from faceteer_studio.inputs import Inputs
from faceteer_studio.passed_on import PassedOn, in_words_of
from faceteer_studio.upstreams import Upstreams

_log = logging.getLogger(__name__)
# Searching by words alone is better than waiting longer for their meaning.
_ENCODER_S = 2.0


class LibraryFront:
    """Two calls of LibraryService."""

    def __init__(self, upstreams: Upstreams, cache: Cache) -> None:
        self._upstreams = upstreams
        self._inputs = Inputs(upstreams, cache)
        self._identity = Identity(upstreams)
        self._icons = Icons(upstreams, cache, self._identity)

    def handlers(self) -> dict[str, Any]:
        """gRPC handlers by method name, to stand before the library's own."""
        return {
            "SearchFeatures": grpc.unary_unary_rpc_method_handler(
                self.SearchFeatures,
                request_deserializer=library_pb2.SearchFeaturesRequest.FromString,
                response_serializer=library_pb2.SearchFeaturesResponse.SerializeToString,
            ),
            "GetFeatureIcon": grpc.unary_unary_rpc_method_handler(
                self.GetFeatureIcon,
                request_deserializer=library_pb2.GetFeatureIconRequest.FromString,
                response_serializer=library_pb2.GetFeatureIconResponse.SerializeToString,
            ),
        }

    async def SearchFeatures(
        self, request: library_pb2.SearchFeaturesRequest, context: Any
    ) -> library_pb2.SearchFeaturesResponse:
        remaining: Remaining = context.time_remaining
        match request.WhichOneof("query"):
            case "picture":
                # First, since setting another query clears this one.
                features = await self._features(request.picture, remaining())
                request.activations.CopyFrom(features)
            case "words" if not request.HasField("words_embeds") and request.words.strip():
                embeds = await self._meaning(request.words, remaining())
                if embeds is not None:
                    request.words_embeds.CopyFrom(embeds)
        answer: library_pb2.SearchFeaturesResponse = await self._upstreams.library.call(
            "SearchFeatures", request, remaining()
        )
        return answer

    async def GetFeatureIcon(
        self, request: library_pb2.GetFeatureIconRequest, context: Any
    ) -> library_pb2.GetFeatureIconResponse:
        remaining: Remaining = context.time_remaining
        try:
            answer: library_pb2.GetFeatureIconResponse = await self._upstreams.library.call(
                "GetFeatureIcon", request, remaining()
            )
            return answer
        except FaceteerError as error:
            packed = error.metadata.pop(TEMPLATE, "")
            if error.reason != "ICON_NOT_MADE" or not packed:
                raise
            not_made = error
        try:
            template = unpack_template(packed)
        except ValueError:
            raise not_made from None
        if len(template) != (await self._identity.get(remaining())).sae.d_in:
            raise not_made
        icon = await self._icons.get(int(not_made.metadata["feature_index"]), template, remaining)
        return library_pb2.GetFeatureIconResponse(
            icon=icon.webp, strengths=STRENGTHS, execution=execution(icon.revision, icon.cached)
        )

    async def _features(self, picture: tensor_pb2.EmbedsInput, timeout: float | None) -> tensor_pb2.SparseFeatures:
        """The features of a picture's embedding. Raises what is wrong with it, at ``picture``."""
        match picture.WhichOneof("source"):
            case "embedding_id":
                source = (await self._inputs.look_up(picture.embedding_id)).source
            case "embeds":
                source = picture
            case _:
                raise InvalidField("picture", "is empty; give embedding_id or embeds")
        words = {"inputs[0]": "picture"}
        try:
            answer = await self._upstreams.sae.call(
                "EncodeFeatures", sae_pb2.EncodeFeaturesRequest(inputs=[source]), timeout
            )
        except FaceteerError as error:
            raise in_words_of(error, words) from None
        (result,) = answer.results
        if result.WhichOneof("result") == "error":
            raise in_words_of(PassedOn(result.error), words)
        features: tensor_pb2.SparseFeatures = result.encoding.features
        return features

    async def _meaning(self, words: str, timeout: float | None) -> tensor_pb2.Tensor | None:
        """The words' text embedding; None, and the search goes by words alone, wherever there is none to be had."""
        patience = _ENCODER_S if timeout is None else min(_ENCODER_S, timeout / 2)
        try:
            studio = await self._identity.get(patience)
            if not (studio.encoder.has_text_tower and studio.library.searches_meaning):
                return None
            answer = await self._upstreams.encoder.call(
                "EncodeTexts", encoder_pb2.EncodeTextsRequest(texts=[words]), patience
            )
        except FaceteerError as error:
            _log.info("a search goes by words alone: %s", error.reason)
            return None
        (result,) = answer.results
        return result.embedding.embeds if result.WhichOneof("result") == "embedding" else None
