"""Shares the model's time among all jobs: one call after another on its thread.

The life of a generation: ``submit`` puts its images into the queue, or raises QueueFull at once. Before every turn the
queue picks afresh which jobs proceed, so that a request with many images never keeps a later one waiting, a new one
joins at the next step, and one that was closed is simply no longer picked. Images advance together; inversions and
prompts take turns with them, one call of the model each. What is drawn goes to :class:`.delivery.Delivery`. All state
lives on the event loop; only calls of the model run on the worker's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from faceteer_runtime.batching import ModelWorker
from faceteer_runtime.cache import Cache
from faceteer_runtime.errors import Draining
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.outcome import Computed

from faceteer_generator.delivery import Delivery, ImageJob
from faceteer_generator.denoise import Denoiser
from faceteer_generator.generation import Generation, ImageFile
from faceteer_generator.queue import Job, Queue, Request, charge
from faceteer_generator.requests import GenerationSettings, ImageSpec

T = TypeVar("T")
R = TypeVar("R")

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _CallsJob(Job):
    """An inversion or a prompt: ``begin`` makes the task, whose ``advance`` is one call, ``result`` reads it."""

    lane: ClassVar[str] = "calls"

    begin: Callable[[], Any]
    result: Callable[[Any], Any]

    def advance(self) -> tuple[Any, float]:
        """On the model's thread: one call; the result after the last one, and the seconds it took."""
        started = time.perf_counter()
        if self.task is None:
            self.task = self.begin()
        self.task.advance()
        result = self.result(self.task) if self.task.done else None
        return result, time.perf_counter() - started


class _Caller(Request):
    """Waits for one job."""

    def __init__(self) -> None:
        super().__init__()
        self.outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def deliver(self, index: int, result: Any) -> None:
        """Wakes the caller."""
        if not self.outcome.done():
            self.outcome.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Wakes the caller with an error."""
        if not self.outcome.done():
            self.outcome.set_exception(error)


class Engine:
    """Draws images, and makes other calls of the model, for many requests at once.

    Args:
        denoiser: draws.
        worker: the model's thread.
        cache: finished files are kept in it.
        max_batch: most images in one step, and most inversions and prompts that take turns with it.
        max_queue: most jobs that wait beyond those.
        metrics: where to report, under the name "generator".
    """

    def __init__(
        self,
        denoiser: Denoiser,
        worker: ModelWorker,
        cache: Cache,
        *,
        max_batch: int,
        max_queue: int,
        metrics: Metrics | None = None,
    ) -> None:
        metrics = metrics or Metrics()
        self._denoiser, self._worker = denoiser, worker
        self._queue = Queue(max_batch, max_queue, metrics)
        self._delivery = Delivery(denoiser, worker, cache, self._queue)
        self._driver: asyncio.Task[None] | None = None
        self._closed = False
        self._sizes = metrics.batch_size.labels("generator")
        self._model_seconds = metrics.model_seconds.labels("generator")

    @property
    def active(self) -> int:
        """Jobs that wait or are worked on now."""
        return len(self._queue)

    def submit(
        self,
        settings: GenerationSettings,
        specs: Sequence[tuple[str, ImageSpec]],
        cached: dict[int, ImageFile],
        *,
        preview_every: int,
        cache_us: int,
    ) -> Generation:
        """Begins a request.

        Args:
            settings: in force.
            specs: one image for each seed, with its cache key.
            cached: those that need no drawing, by their index.
            preview_every: steps between previews; 0 for none.
            cache_us: microseconds that looking for them took.

        Raises:
            QueueFull: too many jobs wait; at once, with an estimate of when there is room.
            Draining: the engine is closed.
        """
        generation = Generation(settings, preview_every, cached, cache_us, self._queue.leave)
        ahead = len(self._queue)
        self._join(
            generation,
            [
                (index, ImageJob(key, spec.run_steps, spec, settings.format, settings.quality))
                for index, (key, spec) in enumerate(specs)
                if index not in cached
            ],
        )
        generation.queued(ahead)
        return generation

    async def run(self, key: str, calls: int, begin: Callable[[], T], result: Callable[[T], R]) -> Computed[R]:
        """The result of a task of several calls, which take turns with the steps of images.

        Args:
            key: its name; identical concurrent tasks run once.
            calls: how many calls it takes, as far as is known.
            begin: makes the task.
            result: reads it when it is done. Both are called on the model's thread.

        Raises:
            QueueFull, Draining: as :meth:`submit`.
            Exception: what the task raised.
        """
        caller, started = _Caller(), time.perf_counter()
        self._join(caller, [(0, _CallsJob(key, calls, begin, result))])
        try:
            value: R = await caller.outcome
        finally:
            self._queue.leave(caller)
        waited = time.perf_counter() - started - caller.compute_s
        return Computed(value, int(waited * 1e6), int(caller.compute_s * 1e6))

    async def close(self) -> None:
        """Fails what is in progress with Draining."""
        self._closed = True
        for request in self._queue.requests:
            self._queue.fail_request(request, Draining())
        if self._driver is not None:
            self._driver.cancel()
            await asyncio.gather(self._driver, return_exceptions=True)
        await self._delivery.close()

    def _join(self, request: Request, jobs: Sequence[tuple[int, Job]]) -> None:
        if self._closed:
            raise Draining()
        if jobs:
            self._queue.join(request, jobs)
            if self._driver is None or self._driver.done():
                self._driver = asyncio.create_task(self._drive())

    async def _drive(self) -> None:
        """Turn after turn until nothing is left to do."""
        try:
            while jobs := self._queue.next_turn():
                self._queue.start(jobs)
                started = time.perf_counter()
                images = [job for job in jobs if isinstance(job, ImageJob)]
                previews = [job for job in images if self._delivery.wants_preview(job)]
                if images:
                    await self._step(images, previews)
                for job in jobs:
                    if isinstance(job, _CallsJob) and job.watchers:
                        await self._advance(job)
                self._queue.turn_took(time.perf_counter() - started)
                await self._delivery.previews(previews)
                await self._delivery.images([job for job in images if job.done])
        except Exception as error:
            _log.exception("the engine stopped; its requests fail, the next one starts it again")
            for request in self._queue.requests:
                self._queue.fail_request(request, error)

    async def _step(self, jobs: list[ImageJob], previews: list[ImageJob]) -> None:
        """One step of images together."""
        failed, seconds = await self._worker.run(self._step_on_thread, jobs, set(previews))
        charge(jobs, seconds)
        self._sizes.observe(len(jobs))
        self._model_seconds.observe(seconds)
        # Somebody may have joined one of them since the step began.
        self._queue.start(jobs)
        for job in jobs:
            if (error := failed.get(job)) is not None:
                self._queue.fail(job, error)
            for generation, index in job.generations:
                generation.progress(index, job.step, job.calls)

    def _step_on_thread(
        self, jobs: list[ImageJob], previews: set[ImageJob]
    ) -> tuple[dict[ImageJob, BaseException], float]:
        """Begins those that are new and steps all; why some cannot go on, and the seconds it took."""
        started = time.perf_counter()
        failed: dict[ImageJob, BaseException] = {}
        for job in jobs:
            if job.task is None:
                try:
                    job.task = self._denoiser.begin(job.spec)
                except Exception as error:
                    failed[job] = error
        begun = [job for job in jobs if job.task is not None]
        if begun:
            self._denoiser.step([job.task for job in begun], [job in previews for job in begun])
        failed |= {job: job.task.error for job in begun if job.task.error is not None}
        return failed, time.perf_counter() - started

    async def _advance(self, job: _CallsJob) -> None:
        """One call of an inversion or a prompt."""
        try:
            result, seconds = await self._worker.run(job.advance)
        except Draining:
            raise
        except Exception as error:
            self._queue.fail(job, error)
            return
        charge([job], seconds)
        if job.done:
            self._queue.finish(job, result)
