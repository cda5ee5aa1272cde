"""What the encoder service does for a call: pictures and texts to embeddings, from the cache or computed once.

A picture is hashed, looked up, admitted, decoded on a small pool of threads, encoded on the model's one thread together
with whatever else waits then, and cached.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from faceteer_runtime.batching import MicroBatcher, ModelWorker
from faceteer_runtime.cache import Cache
from faceteer_runtime.cache_keys import embedding_id, embeds_key
from faceteer_runtime.embeddings import Embedding, from_record, to_record
from faceteer_runtime.errors import Draining
from faceteer_runtime.execution import Cost
from faceteer_runtime.memo import Memo
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.outcome import Computed, Failed
from faceteer_runtime.record import Record

from faceteer_encoder.admission import Capacity
from faceteer_encoder.model import ClipEncoder
from faceteer_encoder.preprocess import Preprocessor
from faceteer_encoder.settings import EncoderSettings

T = TypeVar("T")
Encoded = Computed[Embedding] | Failed

# Hashing more than this takes longer than a change of threads.
_HASH_INLINE = 256 << 10


class EncoderApplication:
    """The calls of EncoderService, on bytes and texts."""

    def __init__(
        self,
        encoder: ClipEncoder,
        preprocessor: Preprocessor,
        revision: str,
        *,
        cache: Cache,
        worker: ModelWorker,
        metrics: Metrics,
        settings: EncoderSettings,
    ) -> None:
        self._preprocessor = preprocessor
        self._embed_dim = encoder.embed_dim
        self.unknown_words = encoder.unknown_words
        self._revision = revision
        # The last digits depend on what does the arithmetic: two processes that differ in it must not share.
        self._precision = encoder.precision.encode()
        self._memo: Memo[np.ndarray] = Memo(cache, to_record, self._from_record)
        self._pool = ThreadPoolExecutor(settings.encoder_decode_threads, thread_name_prefix="decode")
        self._capacity = Capacity(settings.max_queue)
        batcher = partial(
            MicroBatcher,
            max_batch=settings.encoder_model_batch,
            # One call may bring more than there is room for otherwise.
            max_queue=max(settings.max_queue, settings.encoder_max_batch),
            worker=worker,
            metrics=metrics,
        )
        self._images: MicroBatcher[np.ndarray, np.ndarray] = batcher(encoder.encode_images, name="encoder_images")
        self._texts: MicroBatcher[str, np.ndarray] = batcher(encoder.encode_texts, name="encoder_texts")

    async def encode_images(self, images: Sequence[bytes]) -> tuple[list[Encoded], Cost]:
        """The embedding of each picture file, or why it has none.

        Raises:
            QueueFull: too much is in progress; raised at once, with nothing of this call begun.
            Draining: the service stops.
        """
        names = [await self._image_id(image) for image in images]
        found, cache_us = await self._memo.of_many(
            [embeds_key(name) for name in names], lambda at: self._encode_image(images[at]), self._capacity.holding
        )
        return [_named(name, one) for name, one in zip(names, found, strict=True)], Cost.of(found, cache_us)

    async def encode_texts(self, texts: Sequence[str | Failed]) -> tuple[list[Encoded], Cost]:
        """The embedding of each text; what has failed already stays failed. Raises as :meth:`encode_images`."""
        good = [text for text in texts if not isinstance(text, Failed)]
        names = [embedding_id(self._revision, b"text", self._precision, text.encode()) for text in good]
        found, cache_us = await self._memo.of_many(
            [embeds_key(name) for name in names], lambda at: self._encode_text(good[at]), self._capacity.holding
        )
        rest = map(_named, names, found)
        return [text if isinstance(text, Failed) else next(rest) for text in texts], Cost.of(found, cache_us)

    async def encode_streamed_image(self, image: bytes) -> Encoded:
        """The embedding of one picture of a stream, which waits for room instead of being refused."""
        name = await self._image_id(image)
        key = embeds_key(name)
        x = await self._memo.find(key)
        if x is not None:
            return Computed(Embedding(name, x), cached=True)
        async with self._capacity.waiting():
            return _named(name, await self._memo.compute(key, lambda: self._encode_image(image)))

    async def close(self) -> None:
        """Refuses what still waits and ends the decoding threads."""
        self._images.close()
        self._texts.close()
        await asyncio.to_thread(self._pool.shutdown, True, cancel_futures=True)

    async def _encode_image(self, image: bytes) -> Computed[np.ndarray]:
        started = time.perf_counter()
        pixels = await self._in_pool(self._preprocessor.pixels, image)
        encoded = await self._images.submit(pixels)
        self._capacity.took(encoded.compute_us / 1e6)
        # Waiting for a decoding thread, and decoding, count as waiting for the model.
        return encoded._replace(queue_us=int((time.perf_counter() - started) * 1e6) - encoded.compute_us)

    async def _encode_text(self, text: str) -> Computed[np.ndarray]:
        encoded = await self._texts.submit(text)
        self._capacity.took(encoded.compute_us / 1e6)
        return encoded

    async def _image_id(self, image: bytes) -> str:
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

    def _from_record(self, record: Record) -> np.ndarray | None:
        x = from_record(record)
        return x if x is not None and len(x) == self._embed_dim else None


def _named(name: str, found: Computed[np.ndarray] | Failed) -> Encoded:
    if isinstance(found, Failed):
        return found
    return Computed(Embedding(name, found.value), found.queue_us, found.compute_us, found.cached)
