"""Turns latents into the images that requests wait for: decoded on the model's thread, encoded as files beside it.

A preview never comes after its image.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from faceteer_runtime.batching import ModelWorker
from faceteer_runtime.cache import Cache
from faceteer_runtime.errors import Draining
from faceteer_runtime.record import Record

from faceteer_generator.denoise import Denoiser
from faceteer_generator.generation import Generation, ImageFile
from faceteer_generator.images import encode_image
from faceteer_generator.queue import Job, Queue, charge
from faceteer_generator.requests import Format, ImageSpec

_log = logging.getLogger(__name__)
# Images decoded in one call: bounds how long a burst that ends together delays everybody's next step.
_DECODE_BATCH = 4


@dataclass(eq=False)
class ImageJob(Job):
    """One image in the queue; its ``task`` is a :class:`~faceteer_generator.denoise.Denoising`."""

    lane: ClassVar[str] = "images"

    spec: ImageSpec
    format: Format
    quality: int

    @property
    def step(self) -> int:
        """Steps done."""
        return self.calls - self.calls_left

    @property
    def generations(self) -> list[tuple[Generation, int]]:
        """Who waits for it, and under which index."""
        return [(request, index) for request, index in self.watchers if isinstance(request, Generation)]


class Delivery:
    """Decodes images and previews, makes their files, caches the images and hands all out.

    Args:
        denoiser: decodes.
        worker: the model's thread.
        cache: finished files are kept in it.
        queue: who waits for what.
    """

    def __init__(self, denoiser: Denoiser, worker: ModelWorker, cache: Cache, queue: Queue) -> None:
        self._denoiser, self._worker, self._cache, self._queue = denoiser, worker, cache, queue
        self._files = ThreadPoolExecutor(2, thread_name_prefix="files")
        self._under_way: set[asyncio.Task[None]] = set()
        self._previews: dict[ImageJob, asyncio.Task[None]] = {}

    def wants_preview(self, job: ImageJob) -> bool:
        """Whether somebody asked for a preview after the next step, and none is being made of this image."""
        step = job.step + 1
        return (
            job not in self._previews
            and step < job.calls
            and any(one.preview_every and step % one.preview_every == 0 for one, _ in job.generations)
        )

    async def previews(self, jobs: Sequence[ImageJob]) -> None:
        """Decodes the estimates that the last step left; returns before their files are made."""
        async for job, pixels in self._decoded(jobs, final=False):
            self._previews[job] = self._spawn(self._send_preview(job, job.step, pixels))

    async def images(self, jobs: Sequence[ImageJob]) -> None:
        """Decodes finished latents; returns before their files are made."""
        async for job, pixels in self._decoded(jobs, final=True):
            self._spawn(self._send_image(job, pixels))

    async def close(self) -> None:
        """Drops what is in progress."""
        tasks = list(self._under_way)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._files.shutdown(wait=False, cancel_futures=True)

    async def _decoded(self, jobs: Sequence[ImageJob], *, final: bool) -> AsyncIterator[tuple[ImageJob, np.ndarray]]:
        sizes: dict[tuple[int, int], list[ImageJob]] = defaultdict(list)
        for job in jobs:
            sizes[job.spec.width, job.spec.height].append(job)
        for same in sizes.values():
            for first in range(0, len(same), _DECODE_BATCH):
                for decoded in await self._decode(same[first : first + _DECODE_BATCH], final):
                    yield decoded

    async def _decode(self, jobs: Sequence[ImageJob], final: bool) -> list[tuple[ImageJob, np.ndarray]]:
        """A few of one size, without those that everybody has left; when the call fails, each alone."""
        jobs = [job for job in jobs if job.watchers]
        if not jobs:
            return []
        started = time.perf_counter()
        latents = [job.task.latents if final else job.task.clean for job in jobs]
        try:
            pixels = await self._worker.run(self._denoiser.decode if final else self._denoiser.preview, latents)
        except Draining:
            raise
        except Exception as error:
            if len(jobs) > 1:
                return [decoded for job in jobs for decoded in await self._decode([job], final)]
            self._queue.fail(jobs[0], error)
            return []
        charge(jobs, time.perf_counter() - started)
        return list(zip(jobs, pixels, strict=True))

    async def _send_image(self, job: ImageJob, pixels: np.ndarray) -> None:
        try:
            file = await self._file(job, pixels)
        except Exception as error:
            self._queue.fail(job, error)
            return
        if preview := self._previews.get(job):
            await preview
        self._cache.put(job.key, to_record(file))
        self._queue.finish(job, file)

    async def _send_preview(self, job: ImageJob, step: int, pixels: np.ndarray) -> None:
        try:
            file = await self._file(job, pixels)
            for generation, index in job.generations:
                generation.preview(index, step, file.data)
        except Exception:
            _log.exception("a preview is left out")
        finally:
            del self._previews[job]

    async def _file(self, job: ImageJob, pixels: np.ndarray) -> ImageFile:
        loop = asyncio.get_running_loop()
        data = await loop.run_in_executor(self._files, encode_image, pixels, job.format, job.quality)
        height, width = pixels.shape[:2]
        return ImageFile(data, width, height)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task


def to_record(file: ImageFile) -> Record:
    """What the cache keeps of a file."""
    return {"file": file.data, "size": np.array([file.width, file.height], dtype=np.int32)}


def from_record(record: Record) -> ImageFile:
    """The file that :func:`to_record` kept."""
    width, height = (int(side) for side in record["size"])
    return ImageFile(bytes(record["file"]), width, height)
