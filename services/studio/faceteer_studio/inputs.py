"""A job's picture, whichever way it was given, as an embedding: float32 bytes and an id.

Knows nothing of what the job does with it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from faceteer.v1 import encoder_pb2, execution_pb2, studio_pb2, tensor_pb2
from faceteer_runtime.cache import Cache
from faceteer_runtime.cache_keys import embeds_key
from faceteer_runtime.errors import EmbeddingExpired, FaceteerError, InvalidField
from faceteer_runtime.tensors import to_array, to_tensor

from faceteer_studio.passed_on import PassedOn, in_words_of
from faceteer_studio.upstreams import Upstreams


class Resolved(NamedTuple):
    """An input's embedding.

    Attributes:
        embeds: shape [d]; not checked yet when it came inline.
        embedding_id: empty when it came inline.
        execution: of the encoder; empty unless a picture was given.
    """

    embeds: tensor_pb2.Tensor
    embedding_id: str
    execution: execution_pb2.Execution

    @property
    def source(self) -> tensor_pb2.EmbedsInput:
        """For a child call: always inline, so that no child depends on a cache that it may not share."""
        return tensor_pb2.EmbedsInput(embeds=self.embeds)


class Inputs:
    """Resolves inputs with the encoder and the cache."""

    def __init__(self, upstreams: Upstreams, cache: Cache) -> None:
        self._encoder = upstreams.encoder
        self._cache = cache

    async def resolve(self, given: studio_pb2.ImageInput, field: str, timeout: float | None) -> Resolved:
        """The embedding of ``given``, the request's ``field``.

        Raises:
            InvalidField: nothing given. EmbeddingExpired: the id is not cached. What the encoder raises on a picture.
        """
        match given.WhichOneof("source"):
            case "image":
                return await self._encode(given.image, field, timeout)
            case "embedding_id":
                return await self.look_up(given.embedding_id)
            case "embeds":
                return Resolved(given.embeds, "", execution_pb2.Execution())
        raise InvalidField(field, "is missing; give image, embedding_id or embeds")

    async def look_up(self, embedding_id: str) -> Resolved:
        """The embedding with this id. Raises EmbeddingExpired."""
        record = await self._cache.get(embeds_key(embedding_id))
        embeds = record.get("embeds") if record is not None else None
        if not isinstance(embeds, np.ndarray) or embeds.ndim != 1:
            raise EmbeddingExpired(embedding_id if len(embedding_id) <= 129 else embedding_id[:128] + "…")
        return Resolved(to_tensor(embeds), embedding_id, execution_pb2.Execution(cached=True))

    def keep(self, embedding: tensor_pb2.Embedding) -> None:
        """Remembers an embedding under its id, also for when another process' cache forgets."""
        embeds = to_array(embedding.embeds, field="embeds")
        self._cache.put(embeds_key(embedding.embedding_id), {"embeds": np.array(embeds, np.float32)})

    async def _encode(self, image: bytes, field: str, timeout: float | None) -> Resolved:
        words = {"images[0]": f"{field}.image", "images": f"{field}.image"}
        try:
            answer = await self._encoder.call("EncodeImages", encoder_pb2.EncodeImagesRequest(images=[image]), timeout)
        except FaceteerError as error:
            raise in_words_of(error, words) from None
        (result,) = answer.results
        if result.WhichOneof("result") == "error":
            raise in_words_of(PassedOn(result.error), words)
        self.keep(result.embedding)
        return Resolved(result.embedding.embeds, result.embedding.embedding_id, answer.execution)
