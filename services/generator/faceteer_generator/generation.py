"""One call of Generate under way: the events that its caller hears, kept until they are read."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import NamedTuple

from faceteer_runtime.execution import Cost

from faceteer_generator.queue import Request
from faceteer_generator.requests import GenerationSettings


class ImageFile(NamedTuple):
    """A whole file, and the size of the image in it in pixels."""

    data: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Queued:
    """Accepted; ``position`` jobs are ahead of the request's first one."""

    position: int


@dataclass(frozen=True)
class Started:
    """The first step has begun."""


@dataclass(frozen=True)
class Progress:
    """``step`` of ``steps`` are done for image ``index`` of the request."""

    index: int
    step: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """Image ``index`` as the model imagines it after ``step`` steps, smaller, as a file."""

    index: int
    step: int
    data: bytes


@dataclass(frozen=True)
class Image:
    """Image ``index``, finished."""

    index: int
    seed: int
    file: ImageFile
    cached: bool


@dataclass(frozen=True)
class Finished:
    """All images are done."""

    cost: Cost


Event = Queued | Started | Progress | Preview | Image | Finished


class Generation(Request):
    """Events between the engine, which never waits, and a reader, who may be slow.

    Progress and previews are replaced by newer ones of the same image that come before they were read, so that at most
    one of each, and each finished image once, is ever held. Nothing else is dropped, and order is kept.

    Args:
        settings: in force.
        preview_every: steps between previews; 0 for none.
        cached: by index, images that need no drawing.
        cache_us: microseconds that looking for them took.
        leave: stops what is drawn for this request.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        preview_every: int,
        cached: dict[int, ImageFile],
        cache_us: int,
        leave: Callable[[Generation], None],
    ) -> None:
        super().__init__()
        self.settings = settings
        self.preview_every = preview_every
        self._cached = cached
        self._cache_us = cache_us
        self._leave = leave
        self._left = len(settings.seeds) - len(cached)
        self._events: deque[Event] = deque()
        self._latest: dict[tuple[type[Event], int], Event] = {}
        self._filled = asyncio.Event()
        self._error: BaseException | None = None

    # -- for the engine ----------------------------------------------------------------------

    def queued(self, position: int) -> None:
        """Accepted, behind ``position`` jobs of others; without jobs of its own it is finished."""
        self._put(Queued(position))
        if not self._left:
            self.start()
            self._put(Finished(Cost(True, 0, 0, self._cache_us)))

    def start(self) -> bool:
        """Says so at the first call, and hands out what was cached."""
        if first := super().start():
            self._put(Started())
            for index, file in self._cached.items():
                self._put(Image(index, self.settings.seeds[index], file, cached=True))
        return first

    def progress(self, index: int, step: int, steps: int) -> None:
        """One step more."""
        self._put(Progress(index, step, steps))

    def preview(self, index: int, step: int, data: bytes) -> None:
        """A rough image, for those who asked for any."""
        if self.preview_every:
            self._put(Preview(index, step, data))

    def deliver(self, index: int, result: ImageFile) -> None:
        """A finished image; Finished after the last one."""
        self._put(Image(index, self.settings.seeds[index], result, cached=False))
        self._left -= 1
        if not self._left:
            times = int(self.waited_s * 1e6), int(self.compute_s * 1e6), self._cache_us
            self._put(Finished(Cost(False, *times)))

    def fail(self, error: BaseException) -> None:
        """Ends the reader with the first of such errors, after what it has not read yet."""
        if self._error is None:
            self._error = error
        self._filled.set()

    # -- for the reader ----------------------------------------------------------------------

    async def events(self) -> AsyncIterator[Event]:
        """Queued, Started, then Progress, Preview and Image, and Finished last.

        Raises:
            Exception: what stopped one of the images; Draining when the server stops.
        """
        while True:
            while self._events:
                event = self._events.popleft()
                if isinstance(event, Progress | Preview):
                    del self._latest[type(event), event.index]
                yield event
                if isinstance(event, Finished):
                    return
            if self._error is not None:
                raise self._error
            self._filled.clear()
            await self._filled.wait()

    def close(self) -> None:
        """Stops drawing what nobody else waits for, from the next step on. Idempotent."""
        self._leave(self)

    def __len__(self) -> int:
        """Events that wait to be read."""
        return len(self._events)

    def _put(self, event: Event) -> None:
        if isinstance(event, Progress | Preview):
            key = (type(event), event.index)
            stale = self._latest.get(key)
            if stale is not None:
                self._events.remove(stale)
            self._latest[key] = event
        self._events.append(event)
        self._filled.set()
