"""Embeddings of pictures and texts: from the cache where known, else decoded and encoded once for all who wait.

Knows nothing of gRPC. A picture's life: hashed, looked up, admitted, decoded on a small pool of threads, encoded by the
model's one thread together with whatever else waits then, cached.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from faceteer_runtime.batching import Batched, MicroBatcher, ModelWorker
from faceteer_runtime.cache import Cache, Record, SingleFlight
from faceteer_runtime.cache_keys import embedding_id, embeds_key
from faceteer_runtime.errors import Draining, QueueFull
from faceteer_runtime.metrics import Metrics

from faceteer_encoder.admission import Room
from faceteer_encoder.model import ClipEncoder
from faceteer_encoder.preprocess import Preprocessor

T = TypeVar("T")

# Hashing more than this takes longer than a change of threads.
_HASH_INLINE = 256 << 10


class Embedded(NamedTuple):
    """One picture's or text's embedding.

    Attributes:
        embedding_id: its name in later calls.
        embeds: float32 [embed_dim], or why there is none.
        cached: whether nothing was decoded and no model ran.
        queue_us: microseconds from admission until the model took it.
        compute_us: microseconds in the model.
    """

    embedding_id: str
    embeds: np.ndarray | Exception
    cached: bool
    queue_us: int = 0
    compute_us: int = 0


class Embeddings:
    """Encodes pictures and texts, each content once."""

    def __init__(
        self,
        encoder: ClipEncoder,
        preprocessor: Preprocessor,
        revision: str,
        *,
        cache: Cache,
        worker: ModelWorker,
        metrics: Metrics,
        max_batch: int,
        model_batch: int,
        max_queue: int,
        decode_threads: int,
    ) -> None:
        self._preprocessor = preprocessor
        self._embed_dim = encoder.embed_dim
        self._revision = revision
        # The last digits depend on what does the arithmetic: two processes that differ in it must not share.
        self._precision = encoder.precision.encode()
        self._cache = cache
        self._flights = SingleFlight()
        self._pool = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._room = Room(max_queue)
        batcher = partial(
            MicroBatcher, max_batch=model_batch, max_queue=max(max_queue, max_batch), worker=worker, metrics=metrics
        )
        self._images: MicroBatcher[np.ndarray, np.ndarray] = batcher(encoder.encode_images, name="encoder_images")
        self._texts: MicroBatcher[str, np.ndarray] = batcher(encoder.encode_texts, name="encoder_texts")

    async def of_images(self, images: Sequence[bytes]) -> tuple[list[Embedded], int]:
        """The embedding of each picture file, and the microseconds spent reading the cache (one MGET for all).

        A picture that cannot be read has its error in its place.

        Raises:
            QueueFull: too much is under way; at once, and nothing of this call was begun.
            Draining: the service stops.
        """
        digests = [await self._digest(image) for image in images]
        return await self._of_many(digests, [partial(self._encode_image, image) for image in images])

    async def of_texts(self, texts: Sequence[str]) -> tuple[list[Embedded], int]:
        """The embedding of each text; otherwise as :meth:`of_images`."""
        digests = [embedding_id(self._revision, b"text", self._precision, text.encode()) for text in texts]
        return await self._of_many(digests, [partial(self._texts.submit, text) for text in texts])

    async def of_streamed_image(self, image: bytes) -> Embedded:
        """The embedding of one picture of a stream, which waits for room instead of being refused."""
        name = await self._digest(image)
        embeds = self._from_record(await self._cache.get(embeds_key(name)))
        if embeds is not None:
            return Embedded(name, embeds, True)
        await self._room.wait()
        try:
            return await self._make(name, partial(self._encode_image, image))
        finally:
            self._room.leave()

    async def close(self) -> None:
        """Refuses what still waits and ends the decoding threads."""
        self._images.close()
        self._texts.close()
        await asyncio.to_thread(self._pool.shutdown, True, cancel_futures=True)

    async def _of_many(
        self, names: list[str], makers: list[Callable[[], Awaitable[Batched[np.ndarray]]]]
    ) -> tuple[list[Embedded], int]:
        started = time.perf_counter()
        records = await self._cache.get_many([embeds_key(name) for name in names])
        cache_us = int((time.perf_counter() - started) * 1e6)
        known = [self._from_record(record) for record in records]
        missing = [at for at, embeds in enumerate(known) if embeds is None]
        self._room.take(len(missing))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {at: group.create_task(self._make(names[at], makers[at])) for at in missing}
        except BaseExceptionGroup as refused:
            raise refused.exceptions[0] from None
        finally:
            self._room.leave(len(missing))
        answers = [
            tasks[at].result() if embeds is None else Embedded(names[at], embeds, True)
            for at, embeds in enumerate(known)
        ]
        return answers, cache_us

    async def _make(self, name: str, maker: Callable[[], Awaitable[Batched[np.ndarray]]]) -> Embedded:
        """Makes the embedding, or waits for whoever is making it already."""

        async def run() -> Embedded:
            started = time.perf_counter()
            made = await maker()
            self._cache.put(embeds_key(name), {"embeds": made.value})
            self._room.took(made.compute_us / 1e6)
            queue_us = int((time.perf_counter() - started) * 1e6) - made.compute_us
            return Embedded(name, made.value, False, max(made.queue_us, queue_us), made.compute_us)

        try:
            return await self._flights.run(name, run)
        except (QueueFull, Draining):
            raise
        except Exception as error:
            return Embedded(name, error, False)

    async def _encode_image(self, image: bytes) -> Batched[np.ndarray]:
        pixels = await self._in_pool(self._preprocessor.pixels, image)
        return await self._images.submit(pixels)

    async def _digest(self, image: bytes) -> str:
        """The embedding's id: the picture's bytes, and by the revision the preprocessing and the weights."""
        if len(image) <= _HASH_INLINE:
            digest = hashlib.sha256(image).digest()
        else:
            digest = await self._in_pool(lambda: hashlib.sha256(image).digest())
        return embedding_id(self._revision, b"image", self._precision, digest)

    async def _in_pool(self, function: Callable[..., T], *arguments: object) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
        except RuntimeError as error:
            if "shutdown" in str(error):
                raise Draining() from None
            raise

    def _from_record(self, record: Record | None) -> np.ndarray | None:
        """The embeds; None for a record that is not of this form (another version's, say)."""
        embeds = None if record is None else record.get("embeds")
        if not isinstance(embeds, np.ndarray) or embeds.dtype != np.float32 or embeds.shape != (self._embed_dim,):
            return None
        return embeds
