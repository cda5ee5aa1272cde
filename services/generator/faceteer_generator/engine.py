"""Who is drawn next: requests in, events out, one denoising step after another on the model's thread.

Knows nothing of gRPC, and of the model only that it begins, steps and decodes pictures.

The life of a request: ``submit`` looks its pictures up in the cache, admits the rest or raises QueueFull at once, and
returns a :class:`Run`, whose events the caller reads. Before every step the engine picks up to ``max_batch`` pictures
anew from all that are unfinished: each request's first, in order of arrival, then each one's second, and so on. So a
request with many pictures never keeps a later one waiting, a new one joins at the next step, and one that was closed
is simply no longer picked. All state lives on the event loop; only begin, step and decode run on the worker's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from faceteer_runtime.batching import ModelWorker
from faceteer_runtime.cache import Cache
from faceteer_runtime.errors import Draining, QueueFull
from faceteer_runtime.metrics import Metrics

from faceteer_generator.events import Finished, Image, Preview, Progress, Queued, Started
from faceteer_generator.pictures import encode_picture
from faceteer_generator.requests import Drawing, Generation, ImageStart, NoiseStart, image_key
from faceteer_generator.runs import Job, Run

_log = logging.getLogger(__name__)
_MIN_RETRY_S = 0.05
# Pictures decoded in one call, so that a burst that ends together does not hold up everybody's next step for long.
_DECODE_BATCH = 4


class Model(Protocol):
    """What the engine asks of :class:`faceteer_generator.denoise.Denoiser`."""

    def begin(self, drawing: Drawing) -> Any:
        """A picture before its first step."""

    def step(self, pictures: Sequence[Any], estimates: Sequence[bool]) -> None:
        """One step of each."""

    def decode(self, latents: Sequence[Any]) -> list[np.ndarray]:
        """Latents of one size to pixels."""

    def preview(self, estimates: Sequence[Any]) -> list[np.ndarray]:
        """Estimates of clean latents of one size to pixels, of a smaller picture where that is cheaper."""


class Engine:
    """Draws pictures for many requests at once.

    Args:
        model: see :class:`Model`.
        worker: the model's thread; the engine closes it.
        cache: finished files are kept in it.
        revision: of the generator part, for cache keys.
        precision: of the model, for cache keys.
        max_batch: most pictures in one step.
        max_queue: most unfinished pictures beyond those.
        metrics: where to report, under the name "generator".
    """

    def __init__(
        self,
        model: Model,
        worker: ModelWorker,
        cache: Cache,
        *,
        revision: str,
        precision: str,
        max_batch: int,
        max_queue: int,
        metrics: Metrics | None = None,
    ) -> None:
        metrics = metrics or Metrics()
        self.revision = revision
        self.max_batch = max_batch
        self._max_live = max_batch + max_queue
        self._model, self._worker, self._cache, self._precision = model, worker, cache, precision
        self._runs: dict[Run, None] = {}
        self._jobs: dict[str, Job] = {}
        self._driver: asyncio.Task[None] | None = None
        self._deliveries: set[asyncio.Task[None]] = set()
        self._files = ThreadPoolExecutor(2, thread_name_prefix="pictures")
        self._closed = False
        self._step_s = 0.0
        self._depth = metrics.queue_depth.labels("generator")
        self._refused = metrics.queue_refused.labels("generator")
        self._sizes = metrics.batch_size.labels("generator")
        self._queue_seconds = metrics.queue_seconds.labels("generator")
        self._model_seconds = metrics.model_seconds.labels("generator")

    @property
    def active(self) -> int:
        """Pictures that are waiting or being drawn now."""
        return len(self._jobs)

    @property
    def capacity(self) -> int:
        """Most pictures that can be active; one request can never have more."""
        return self._max_live

    # -- requests ----------------------------------------------------------------------------

    async def submit(
        self,
        generation: Generation,
        embeds: np.ndarray,
        negative: np.ndarray | None = None,
        *,
        start: ImageStart | NoiseStart | None = None,
        preview_every: int = 0,
    ) -> Run:
        """Begins a request.

        Args:
            generation: settings in force.
            embeds: float32 [d].
            negative: float32 [d], or None for the bundle's own.
            start: an image or noise to start from; None for each seed's own noise.
            preview_every: steps between previews; 0 for none.

        Raises:
            QueueFull: too many pictures wait; at once, with an estimate of when there is room.
            Draining: the engine is closed.
        """
        run = Run(self.leave, generation, preview_every)
        drawings = generation.drawings(embeds, negative, start)
        file = (generation.format, generation.quality)
        keys = [image_key(self.revision, self._precision, drawing, *file) for drawing in drawings]
        records = await self._cache.get_many(keys)
        run.cache_us = int((time.perf_counter() - run.submitted) * 1e6)
        if self._closed:
            raise Draining()
        missing = {key for key, record in zip(keys, records, strict=True) if record is None}
        # Work that is under way for somebody else already takes no new place.
        if len(self._jobs) + len(missing - self._jobs.keys()) > self._max_live:
            self._refused.inc()
            raise QueueFull(self._retry_after_s())
        run.mailbox.put(Queued(len(self._jobs)))
        run.left = len(drawings)
        for index, (key, drawing, record) in enumerate(zip(keys, drawings, records, strict=True)):
            if record is not None:
                width, height = (int(side) for side in record["size"])
                run.cached.append(
                    Image(index, generation.seeds[index], bytes(record["file"]), width, height, cached=True)
                )
                run.left -= 1
                continue
            job = self._jobs.get(key)
            if job is None:
                job = self._jobs[key] = Job(key, drawing, *file)
            job.watchers.append((run, index))
            run.jobs.append(job)
        if run.left:
            self._runs[run] = None
            self._measure_depth()
            if self._driver is None or self._driver.done():
                self._driver = asyncio.create_task(self._drive())
        else:
            self._start(run)
            run.mailbox.put(Finished(cached=True, queue_us=0, compute_us=0, cache_us=run.cache_us))
        return run

    def leave(self, run: Run) -> None:
        """See :meth:`Run.close`."""
        self._runs.pop(run, None)
        for job in run.jobs:
            job.watchers = [(watcher, index) for watcher, index in job.watchers if watcher is not run]
            if not job.watchers:
                self._forget(job)
        run.jobs = []

    async def close(self) -> None:
        """Fails what is under way with Draining, and ends the threads."""
        self._closed = True
        for run in list(self._runs):
            self._fail(run, Draining())
        tasks = [task for task in (self._driver, *self._deliveries) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._worker.close)
        self._files.shutdown(wait=False, cancel_futures=True)

    def _fail(self, run: Run, error: BaseException) -> None:
        run.mailbox.fail(error)
        self.leave(run)

    def _fail_job(self, job: Job, error: BaseException) -> None:
        for run in {run for run, _ in job.watchers}:
            self._fail(run, error)

    def _forget(self, job: Job) -> None:
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]
            self._measure_depth()

    def _measure_depth(self) -> None:
        self._depth.set(max(0, len(self._jobs) - self.max_batch))

    def _retry_after_s(self) -> float:
        steps = sum(job.drawing.run_steps - job.steps_done for job in self._jobs.values())
        # Room for the refused request comes with the first places that get free, hence the share of one batch.
        return max(_MIN_RETRY_S, steps / max(1, len(self._jobs)) * self._step_s)

    # -- steps -------------------------------------------------------------------------------

    def _pick(self) -> list[Job]:
        """The pictures of the next step: first ones first, in order of arrival."""
        lines = [[job for job in run.jobs if not job.drawn] for run in self._runs]
        picked: dict[int, Job] = {}
        place = 0
        while len(picked) < self.max_batch and (lines := [line for line in lines if place < len(line)]):
            for line in lines:
                if len(picked) < self.max_batch:
                    picked[id(line[place])] = line[place]
            place += 1
        return list(picked.values())

    async def _drive(self) -> None:
        """Steps until nothing is left to do."""
        try:
            while jobs := self._pick():
                self._announce(jobs)
                wanted = [self._wants_preview(job) for job in jobs]
                seconds = await self._worker.run(self._step, jobs, wanted)
                self._account(jobs, seconds)
                for job in jobs:
                    self._report(job)
                await self._decode(
                    [job for job, preview in zip(jobs, wanted, strict=True) if preview and job.watchers], final=False
                )
                await self._decode([job for job in jobs if job.drawn and job.watchers], final=True)
        except Exception as error:
            _log.exception("the engine stopped; its requests fail, the next one starts it again")
            for run in list(self._runs):
                self._fail(run, error)

    def _step(self, jobs: list[Job], wanted: list[bool]) -> float:
        """On the model's thread: begins those that are new and steps all; the seconds it took."""
        started = time.perf_counter()
        for job in jobs:
            if job.picture is None:
                job.picture = self._model.begin(job.drawing)
        self._model.step([job.picture for job in jobs], wanted)
        return time.perf_counter() - started

    def _announce(self, jobs: list[Job]) -> None:
        for job in jobs:
            for run, _ in job.watchers:
                if run.started is None:
                    self._start(run)
                    self._queue_seconds.observe(run.waited_us / 1e6)

    def _start(self, run: Run) -> None:
        run.started = time.perf_counter()
        run.mailbox.put(Started())
        for image in run.cached:
            run.mailbox.put(image)
        run.cached = []

    def _wants_preview(self, job: Job) -> bool:
        step = job.steps_done + 1
        return (
            (job.preview is None or job.preview.done())
            and step < job.drawing.run_steps
            and any(run.preview_every and step % run.preview_every == 0 for run, _ in job.watchers)
        )

    def _account(self, jobs: list[Job], seconds: float) -> None:
        self._step_s = seconds if self._step_s == 0.0 else 0.8 * self._step_s + 0.2 * seconds
        self._sizes.observe(len(jobs))
        self._model_seconds.observe(seconds)
        for run in {run for job in jobs for run, _ in job.watchers}:
            run.compute_s += seconds

    def _report(self, job: Job) -> None:
        """Tells watchers of a step; fails them when the picture cannot go on."""
        if job.picture.error is not None:
            self._fail_job(job, job.picture.error)
            return
        # Somebody may have joined this very picture since the step began.
        self._announce([job])
        job.steps_done = job.picture.position
        job.drawn = job.picture.done
        for run, index in job.watchers:
            run.mailbox.put(Progress(index, job.steps_done, job.drawing.run_steps))

    # -- pixels and files --------------------------------------------------------------------

    async def _decode(self, jobs: list[Job], *, final: bool) -> None:
        """Decodes pictures or previews, a few of one size at a time; their files are made beside the next steps."""
        sizes: dict[tuple[int, int], list[Job]] = defaultdict(list)
        for job in jobs:
            sizes[job.drawing.width, job.drawing.height].append(job)
        for same in sizes.values():
            for first in range(0, len(same), _DECODE_BATCH):
                await self._decode_some([job for job in same[first : first + _DECODE_BATCH] if job.watchers], final)

    async def _decode_some(self, jobs: list[Job], final: bool) -> None:
        if not jobs:
            return
        started = time.perf_counter()
        latents = [job.picture.latents if final else job.picture.clean for job in jobs]
        try:
            images = await self._worker.run(self._model.decode if final else self._model.preview, latents)
        except Draining:
            raise
        except Exception as error:
            if len(jobs) == 1:
                self._fail_job(jobs[0], error)
            else:
                for job in jobs:
                    await self._decode_some([job], final)
            return
        seconds = time.perf_counter() - started
        for run in {run for job in jobs for run, _ in job.watchers}:
            run.compute_s += seconds
        for job, pixels in zip(jobs, images, strict=True):
            if final:
                self._spawn(self._deliver(job, pixels))
            else:
                job.preview = self._spawn(self._send_preview(job, job.steps_done, pixels))

    async def _deliver(self, job: Job, pixels: np.ndarray) -> None:
        height, width = pixels.shape[:2]
        try:
            data = await self._encode(job, pixels)
        except Exception as error:
            self._fail_job(job, error)
            return
        if job.preview is not None:
            await job.preview
        self._cache.put(job.key, {"file": data, "size": np.array([width, height], dtype=np.int32)})
        self._forget(job)
        self._announce([job])
        for run, index in job.watchers:
            run.mailbox.put(Image(index, run.generation.seeds[index], data, width, height, cached=False))
            run.left -= 1
            if run.left == 0:
                run.mailbox.put(Finished(False, run.waited_us, int(run.compute_s * 1e6), run.cache_us))
                self._runs.pop(run, None)

    async def _send_preview(self, job: Job, step: int, pixels: np.ndarray) -> None:
        try:
            data = await self._encode(job, pixels)
        except Exception:
            _log.exception("a preview is left out")
            return
        for run, index in job.watchers:
            if run.preview_every:
                run.mailbox.put(Preview(index, step, data))

    async def _encode(self, job: Job, pixels: np.ndarray) -> bytes:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._files, encode_picture, pixels, job.format, job.quality)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._deliveries.add(task)
        task.add_done_callback(self._deliveries.discard)
        return task
