"""What LibraryService can do only with the help of other services: search by picture and by meaning, icons on demand.

Every call goes to the library, which decides what its caller sees; the methods that need no help never come here.
"""

from __future__ import annotations

import logging

from faceteer.v1 import library_pb2, tensor_pb2
from faceteer_runtime.cache import Cache
from faceteer_runtime.errors import IconNotMade, InvalidField
from faceteer_runtime.execution import execution
from faceteer_runtime.tensors import to_array

from faceteer_studio.application import Studio
from faceteer_studio.icons import Icons
from faceteer_studio.names import meaning_of
from faceteer_studio.ports import Call

_log = logging.getLogger(__name__)


class LibraryFront:
    """Two methods of LibraryService."""

    def __init__(self, studio: Studio, cache: Cache) -> None:
        self._studio = studio
        self._icons = Icons(cache)

    async def search_features(
        self, request: library_pb2.SearchFeaturesRequest, call: Call
    ) -> library_pb2.SearchFeaturesResponse:
        """The library's answer to the request with a picture turned into activations, and words' meaning added."""
        match request.WhichOneof("query"):
            case "picture":
                # First, since setting another query clears this one.
                features = await self._features(request.picture, call)
                request.activations.CopyFrom(features)
            case "words" if not request.HasField("words_embeds") and request.words.strip():
                embeds = await meaning_of(request.words, self._studio.upstreams, call)
                if embeds is not None:
                    request.words_embeds.CopyFrom(embeds)
        return await call.ports.library.search_features(request, call)

    async def get_feature_icon(
        self, request: library_pb2.GetFeatureIconRequest, call: Call
    ) -> library_pb2.GetFeatureIconResponse:
        """The library's icon; where it has none but a recipe, the icon drawn from that."""
        answer = await call.ports.library.get_feature_icon(request, call)
        if answer.WhichOneof("result") == "icon":
            return answer
        recipe = answer.recipe
        sae, generator = await self._studio.upstreams.sae.get(call), await self._studio.upstreams.generator.get(call)
        try:
            template = to_array(recipe.template, field="template", shape=(sae.d_in,))
        except InvalidField as error:
            _log.warning("a library's icon template cannot be used: %s", error)
            raise IconNotMade(recipe.feature_index) from None
        icon = await self._icons.get(recipe.feature_index, template, answer.strengths, sae, generator, call)
        return library_pb2.GetFeatureIconResponse(
            icon=icon.webp,
            strengths=answer.strengths,
            execution=execution(generator.revision, icon.cached),
        )

    async def _features(self, picture: tensor_pb2.EmbedsInput, call: Call) -> tensor_pb2.SparseFeatures:
        """The features of a picture's embedding. Raises what is wrong with it, at ``picture``."""
        match picture.WhichOneof("source"):
            case "embedding_id":
                embedding = await self._studio.look_up(picture.embedding_id)
                picture = tensor_pb2.EmbedsInput(embeds=embedding.embeds)
            case None:
                raise InvalidField("picture", "is empty; give embedding_id or embeds")
        encoding, _ = await self._studio.encode_features(picture, "picture", 0, call)
        return encoding.features
