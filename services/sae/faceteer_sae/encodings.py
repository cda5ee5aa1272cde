"""Features by embedding: from the cache where they are known, else by one pass of the model for all who wait.

Knows nothing of gRPC or of what the features are wanted for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from faceteer_runtime.batching import MicroBatcher, ModelWorker
from faceteer_runtime.cache import Cache, Record, SingleFlight
from faceteer_runtime.cache_keys import FEATURES, cache_key
from faceteer_runtime.errors import Draining, QueueFull
from faceteer_runtime.metrics import Metrics

from faceteer_sae.features import Encoding, encode
from faceteer_sae.model import FeatureActivations, SparseAutoencoder
from faceteer_sae.statistics import FeatureStatistics


class Lookup(NamedTuple):
    """How one embedding's features were come by.

    Attributes:
        encoding: the features, or what kept the model from finding them.
        cached: whether no model ran.
        queue_us: microseconds waited for the model.
        compute_us: microseconds in the model.
    """

    encoding: Encoding | Exception
    cached: bool
    queue_us: int = 0
    compute_us: int = 0


class Encodings:
    """Encodes embeddings, each content once."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        statistics: FeatureStatistics | None,
        revision: str,
        *,
        cache: Cache,
        worker: ModelWorker,
        metrics: Metrics,
        max_batch: int,
        max_queue: int,
    ) -> None:
        self._d_sae = sae.d_sae
        self._revision = revision
        self._cache = cache
        self._flights = SingleFlight()
        self._batcher: MicroBatcher[np.ndarray, Encoding] = MicroBatcher(
            partial(encode, sae, statistics),
            max_batch=max_batch,
            max_queue=max_queue,
            worker=worker,
            name="sae",
            metrics=metrics,
        )

    async def known(self, x: np.ndarray) -> Encoding | None:
        """The features of one embedding, float32 [d_in], if they are cached. No model runs."""
        record = await self._cache.get(self._key(x))
        return None if record is None else self._from_record(record)

    async def of(self, x: np.ndarray) -> Lookup:
        """The features of one embedding, float32 [d_in].

        Raises:
            QueueFull, Draining: as :class:`MicroBatcher` does.
            Exception: whatever the model raised.
        """
        key = self._key(x)
        record = await self._cache.get(key)
        encoding = None if record is None else self._from_record(record)
        return Lookup(encoding, True) if encoding is not None else await self._encode(key, x)

    async def of_many(self, x: Sequence[np.ndarray]) -> tuple[list[Lookup], int]:
        """The features of each embedding, and the microseconds spent reading the cache (one MGET for all).

        An embedding on which the model fails has its exception in its place.

        Raises:
            QueueFull, Draining: about the call as a whole; what it had queued leaves the queue.
        """
        keys = [self._key(one) for one in x]
        started = time.perf_counter()
        records = await self._cache.get_many(keys)
        cache_us = int((time.perf_counter() - started) * 1e6)
        found: list[Lookup | None] = []
        for record in records:
            encoding = None if record is None else self._from_record(record)
            found.append(None if encoding is None else Lookup(encoding, True))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {
                    at: group.create_task(self._encode_or_say_why(keys[at], x[at]))
                    for at, lookup in enumerate(found)
                    if lookup is None
                }
        except BaseExceptionGroup as refused:
            raise refused.exceptions[0] from None
        return [lookup if lookup is not None else tasks[at].result() for at, lookup in enumerate(found)], cache_us

    def close(self) -> None:
        """Refuses what still waits."""
        self._batcher.close()

    def _key(self, x: np.ndarray) -> str:
        return cache_key(FEATURES, self._revision, x.tobytes())

    async def _encode_or_say_why(self, key: str, x: np.ndarray) -> Lookup:
        try:
            return await self._encode(key, x)
        except (QueueFull, Draining):
            raise
        except Exception as error:
            return Lookup(error, False)

    async def _encode(self, key: str, x: np.ndarray) -> Lookup:
        async def run() -> Lookup:
            encoding, queue_us, compute_us = await self._batcher.submit(x)
            self._cache.put(key, _to_record(encoding))
            return Lookup(encoding, False, queue_us, compute_us)

        return await self._flights.run(key, run)

    def _from_record(self, record: Record) -> Encoding | None:
        """The encoding; None for a record that is not of this form (another version's, say)."""
        indices, acts, summary = (record.get(name) for name in ("indices", "activations", "summary"))
        if not (isinstance(indices, np.ndarray) and isinstance(acts, np.ndarray) and isinstance(summary, np.ndarray)):
            return None
        if (
            indices.dtype != np.int32
            or acts.dtype != np.float32
            or indices.shape != acts.shape
            or summary.shape != (4,)
        ):
            return None
        if len(indices) and (indices[0] < 0 or indices[-1] >= self._d_sae):
            return None
        kth_pre_act, explained_variance, cosine, norm = summary.tolist()
        features = FeatureActivations(indices, acts, kth_pre_act)
        return Encoding(features, len(indices), explained_variance, cosine, norm)


def _to_record(encoding: Encoding) -> Record:
    features = encoding.features
    summary = (features.kth_pre_act, encoding.explained_variance, encoding.cosine, encoding.norm)
    return {
        "indices": features.top_indices,
        "activations": features.top_acts,
        "summary": np.array(summary, dtype=np.float64),
    }
