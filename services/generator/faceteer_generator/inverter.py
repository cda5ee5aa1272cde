"""Inversions for many callers: cached, each once at a time, between the denoising steps of pictures.

Knows nothing of gRPC, and of the model only that it begins and advances inversions.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from faceteer_runtime.batching import ModelWorker
from faceteer_runtime.cache import Cache, SingleFlight
from faceteer_runtime.errors import InvalidField, NoiseExpired, QueueFull, RevisionMismatch

from faceteer_generator.inversion import InversionFailed
from faceteer_generator.requests import Drawing, NoiseStart, noise_id, noise_key

_MIN_RETRY_S = 0.05


class Model(Protocol):
    """What is asked of :class:`faceteer_generator.denoise.Denoiser`."""

    def begin_inversion(self, drawing: Drawing) -> Any:
        """An inversion before its first call."""


@dataclass(frozen=True)
class Inverted:
    """Noise and where it came from; times in microseconds, ``cached`` when no model ran."""

    noise_id: str
    noise: np.ndarray
    cached: bool
    queue_us: int
    compute_us: int
    cache_us: int


class Inverter:
    """Inverts pictures.

    One inversion is many calls of the decoder. Each is a job of its own on the model's thread, so that it and the steps
    of pictures take turns, and none waits longer than one of the other.

    Args:
        model: see :class:`Model`.
        worker: the model's thread.
        cache: noise is kept in it.
        revision: of the generator part.
        precision: of the model.
        max_active: most inversions at once; more are refused.
    """

    def __init__(
        self, model: Model, worker: ModelWorker, cache: Cache, *, revision: str, precision: str, max_active: int
    ) -> None:
        self.revision = revision
        self._model, self._worker, self._cache, self._precision = model, worker, cache, precision
        self._max_active = max_active
        self._active = 0
        self._flights = SingleFlight()
        self._seconds = 0.0

    async def invert(self, drawing: Drawing) -> Inverted:
        """The noise that draws ``drawing.start``, an image, again.

        Raises:
            QueueFull: too many inversions are under way.
            InvalidField: the latents overflowed.
        """
        started = time.perf_counter()
        name = noise_id(self.revision, self._precision, drawing)
        record = await self._cache.get(noise_key(name))
        cache_us = int((time.perf_counter() - started) * 1e6)
        if record is not None:
            return Inverted(name, np.asarray(record["noise"]), True, 0, 0, cache_us)
        noise, compute_s, all_s = await self._flights.run(name, lambda: self._admitted(name, drawing))
        return Inverted(name, noise, False, int((all_s - compute_s) * 1e6), int(compute_s * 1e6), cache_us)

    async def recall(self, name: str, *, width: int, height: int, steps: int) -> NoiseStart:
        """The noise that an earlier inversion found, for a picture of this size in these steps.

        Raises:
            RevisionMismatch: it was found with another decoder.
            NoiseExpired: the cache has let it go.
            InvalidField: it was found for another size or number of steps.
        """
        record = await self._cache.get(noise_key(name))
        if record is None:
            revision = name.rpartition("-")[0]
            if revision and len(revision) == len(self.revision) and revision != self.revision:
                raise RevisionMismatch("generator", revision, self.revision)
            raise NoiseExpired(name)
        made_for = tuple(int(number) for number in record["made_for"])
        if name.rpartition("-")[0] != self.revision:
            raise RevisionMismatch("generator", name.rpartition("-")[0], self.revision)
        if made_for != (width, height, steps):
            raise InvalidField(
                "start.noise_id",
                f"was made for {made_for[0]} x {made_for[1]} in {made_for[2]} steps, not {width} x {height} in {steps};"
                " give those settings, or invert the picture with these",
            )
        return NoiseStart(np.asarray(record["noise"]), name)

    async def _admitted(self, name: str, drawing: Drawing) -> tuple[np.ndarray, float, float]:
        if self._active >= self._max_active:
            raise QueueFull(max(_MIN_RETRY_S, self._seconds / self._max_active))
        self._active += 1
        try:
            return await self._run(name, drawing)
        finally:
            self._active -= 1

    async def _run(self, name: str, drawing: Drawing) -> tuple[np.ndarray, float, float]:
        """The noise, seconds in the model, seconds in all."""
        started = time.perf_counter()
        inversion, compute_s = await self._worker.run(_timed, self._model.begin_inversion, drawing)
        try:
            while not inversion.done:
                compute_s += (await self._worker.run(_timed, inversion.advance))[1]
        except InversionFailed as error:
            norm = float(np.linalg.norm(drawing.embeds.astype(np.float64)))
            raise InvalidField(
                "input", f"the picture cannot be inverted: {error}; embeds of norm {norm:.3g} may not be its own"
            ) from None
        self._seconds = time.perf_counter() - started
        made_for = np.array([drawing.width, drawing.height, drawing.steps], dtype=np.int32)
        self._cache.put(noise_key(name), {"noise": inversion.noise, "made_for": made_for})
        return inversion.noise, compute_s, self._seconds


def _timed(function: Any, *args: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - started
