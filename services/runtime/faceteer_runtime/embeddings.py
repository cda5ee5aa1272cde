"""Embeddings in the cache, by id: how they are stored, who may use them, and which error an expired one gives."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from faceteer_runtime.cache import Cache
from faceteer_runtime.cache_keys import embeds_content_id, embeds_key
from faceteer_runtime.errors import EmbeddingExpired, RevisionMismatch
from faceteer_runtime.outcome import Failed, attempt
from faceteer_runtime.record import Record


class Embedding(NamedTuple):
    """An embedding that later calls can name.

    Attributes:
        embedding_id: its name.
        x: float32 [d].
    """

    embedding_id: str
    x: np.ndarray


Source: TypeAlias = str | np.ndarray
"""How a request gives an embedding: the id of an earlier answer, or the values, float32 [d]."""


def to_record(x: np.ndarray) -> Record:
    """An embedding, float32 [d], as the cache holds it."""
    return {"embeds": x}


def from_record(record: Record) -> np.ndarray | None:
    """The embedding again, float32 [d], all finite; None for a record that is not of this form (another version's)."""
    x = record.get("embeds")
    if not isinstance(x, np.ndarray) or x.dtype != np.float32 or x.ndim != 1 or not np.isfinite(x).all():
        return None
    return x


class EmbeddingStore:
    """The embeddings of one encoder.

    Args:
        cache: where they are kept.
        encoder_revision: whose embeddings can be used here.
        dim: their length.
    """

    def __init__(self, cache: Cache, encoder_revision: str, dim: int) -> None:
        self._cache = cache
        self._encoder_revision, self._dim = encoder_revision, dim

    def keep(self, x: np.ndarray) -> Embedding:
        """Names an embedding by its values, float32 [d], and caches it."""
        embedding_id = embeds_content_id(self._encoder_revision, x)
        self._cache.put(embeds_key(embedding_id), to_record(x))
        return Embedding(embedding_id, x)

    async def resolve(self, source: Source) -> Embedding:
        """The embedding that a request names or brings; one that it brings is kept.

        Raises:
            EmbeddingExpired: the cache does not hold it.
            RevisionMismatch: another encoder made it.
        """
        return await self.find(source) if isinstance(source, str) else self.keep(source)

    async def find(self, embedding_id: str) -> Embedding:
        """The embedding of that name; raises as :meth:`resolve`."""
        return self._found(embedding_id, await self._cache.get(embeds_key(embedding_id)))

    async def resolve_many(self, sources: Sequence[Source | Failed]) -> tuple[list[Embedding | Failed], int]:
        """Each embedding as :meth:`resolve` does, or why there is none, and the microseconds spent reading the cache
        (one MGET for all ids). What has failed already stays failed."""
        ids = {at: source for at, source in enumerate(sources) if isinstance(source, str)}
        started = time.perf_counter()
        records = await self._cache.get_many([embeds_key(one) for one in ids.values()]) if ids else []
        cache_us = int((time.perf_counter() - started) * 1e6)
        cached = dict(zip(ids, records, strict=True))
        return [
            attempt(self._found, source, cached[at])
            if isinstance(source, str)
            else source
            if isinstance(source, Failed)
            else self.keep(source)
            for at, source in enumerate(sources)
        ], cache_us

    def _found(self, embedding_id: str, record: Record | None) -> Embedding:
        revision = embedding_id.rpartition("-")[0]
        x = None if record is None else from_record(record)
        if x is None:
            raise EmbeddingExpired(embedding_id)
        if revision != self._encoder_revision:
            raise RevisionMismatch("encoder", revision, self._encoder_revision)
        if len(x) != self._dim:
            raise EmbeddingExpired(embedding_id)
        return Embedding(embedding_id, x)
