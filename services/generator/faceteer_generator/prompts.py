"""Embeddings of prompts for many callers: the prior is loaded when first needed, runs each prompt once, and is cached.

Knows nothing of gRPC; the models are :mod:`.prior`'s.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from faceteer_runtime.batching import ModelWorker
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.cache import Cache, SingleFlight
from faceteer_runtime.cache_keys import EMBEDS, cache_key, embeds_content_id, embeds_key
from faceteer_runtime.errors import InvalidField, NotInBundle, QueueFull

_log = logging.getLogger(__name__)

DEFAULT_STEPS, DEFAULT_GUIDANCE = 25, 4.0
MAX_STEPS, MAX_GUIDANCE = 200, 30.0
# Longer texts are cut to the text encoder's 77 tokens anyway, and no token has this many characters on average.
MAX_CHARACTERS = 10_000


@dataclass(frozen=True)
class Prompt:
    """A text to imagine, and how; see :class:`faceteer_generator.prior.Imagining`."""

    text: str
    negative: str
    seed: int
    steps: int
    guidance_scale: float

    @classmethod
    def checked(cls, text: str, negative: str, seed: int, steps: int, guidance_scale: float | None) -> Prompt:
        """Fills defaults in for 0 and None.

        Raises:
            InvalidField: a value is out of range.
        """
        if not text.strip():
            raise InvalidField("prompt", "is empty; say what to imagine")
        for field, value in (("prompt", text), ("negative_prompt", negative)):
            if len(value) > MAX_CHARACTERS:
                raise InvalidField(field, f"{len(value)} characters are more than {MAX_CHARACTERS}")
        # The scheduler divides by steps - 1.
        steps = steps or DEFAULT_STEPS
        if not 2 <= steps <= MAX_STEPS:
            raise InvalidField("steps", f"must be 2 to {MAX_STEPS}, not {steps}")
        guidance = DEFAULT_GUIDANCE if guidance_scale is None else guidance_scale
        if not 0 <= guidance <= MAX_GUIDANCE:
            raise InvalidField("guidance_scale", f"must be 0 to {MAX_GUIDANCE:g}, not {guidance:g}")
        return cls(text, negative.strip() and negative, seed, steps, float(guidance))


@dataclass(frozen=True)
class Imagined:
    """An embedding under its id; times in microseconds, ``cached`` when no model ran."""

    embedding_id: str
    embeds: np.ndarray
    cached: bool
    queue_us: int
    compute_us: int
    cache_us: int


class Prompts:
    """Imagines embeddings.

    Args:
        load: makes the models; blocks, and is called once, when the first prompt comes.
        begin: models and prompt to an :class:`~faceteer_generator.prior.Imagining`.
        worker: the model's thread.
        cache: embeddings are kept in it.
        revision: of the generator part.
        encoder_revision: in whose space the embeddings are.
        precision: of the models.
        max_active: most prompts at once; more are refused.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        begin: Callable[[Any, Prompt], Any],
        worker: ModelWorker,
        cache: Cache,
        *,
        revision: str,
        encoder_revision: str,
        precision: str,
        max_active: int,
    ) -> None:
        self.revision = revision
        self._load, self._begin, self._worker, self._cache = load, begin, worker, cache
        self._encoder_revision, self._precision = encoder_revision, precision
        self._max_active = max_active
        self._active = 0
        self._flights = SingleFlight()
        self._models: Any = None
        self._loading = asyncio.Lock()
        self._seconds = 0.0

    async def embed(self, prompt: Prompt) -> Imagined:
        """The prompt's embedding, kept in the cache under its id.

        Raises:
            QueueFull: too many prompts are under way.
            NotInBundle: the prior cannot be loaded.
        """
        started = time.perf_counter()
        key = self._key(prompt)
        record = await self._cache.get(key)
        cache_us = int((time.perf_counter() - started) * 1e6)
        if record is not None:
            return self._named(np.asarray(record["embeds"]), True, 0.0, 0.0, cache_us)
        embeds, compute_s, all_s = await self._flights.run(key, lambda: self._admitted(key, prompt))
        return self._named(embeds, False, compute_s, all_s, cache_us)

    def _named(self, embeds: np.ndarray, cached: bool, compute_s: float, all_s: float, cache_us: int) -> Imagined:
        name = embeds_content_id(self._encoder_revision, embeds)
        self._cache.put(embeds_key(name), {"embeds": embeds})
        return Imagined(name, embeds, cached, int((all_s - compute_s) * 1e6), int(compute_s * 1e6), cache_us)

    async def _admitted(self, key: str, prompt: Prompt) -> tuple[np.ndarray, float, float]:
        if self._active >= self._max_active:
            raise QueueFull(max(0.05, self._seconds / self._max_active))
        self._active += 1
        try:
            return await self._run(key, prompt)
        finally:
            self._active -= 1

    async def _run(self, key: str, prompt: Prompt) -> tuple[np.ndarray, float, float]:
        """The embedding, seconds in the model, seconds in all."""
        started = time.perf_counter()
        models = await self._ready()
        compute_s = 0.0
        imagining = await self._worker.run(self._begin, models, prompt)
        while not imagining.done:
            before = time.perf_counter()
            # One call at a time, so that denoising steps come between.
            compute_s += await self._worker.run(_seconds_of, imagining.advance)
            self._seconds = time.perf_counter() - before
        embeds = await self._worker.run(imagining.embeds)
        if not np.isfinite(embeds).all():
            raise InvalidField("guidance_scale", "the embedding overflowed; choose a smaller one")
        self._seconds = time.perf_counter() - started
        self._cache.put(key, {"embeds": embeds})
        return embeds, compute_s, self._seconds

    async def _ready(self) -> Any:
        async with self._loading:
            if self._models is None:
                # Beside the model's thread, which goes on drawing meanwhile.
                try:
                    self._models = await asyncio.to_thread(self._load)
                except BundleError as error:
                    _log.error("the prior cannot be used: %s", error)
                    raise NotInBundle(
                        "prior", "the bundle's prior cannot be loaded; the server's log says why"
                    ) from error
            return self._models

    def _key(self, prompt: Prompt) -> str:
        return cache_key(
            EMBEDS,
            self.revision,
            b"prompt",
            self._precision.encode(),
            prompt.text.encode(),
            prompt.negative.encode(),
            struct.pack("<QId", prompt.seed, prompt.steps, prompt.guidance_scale),
        )


def _seconds_of(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
