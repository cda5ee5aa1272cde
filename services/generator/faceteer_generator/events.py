"""What a caller hears of its generation, and the mailbox that keeps it until it is read.

Knows nothing of the model or of gRPC.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Queued:
    """Accepted; ``position`` pictures are ahead of the request's first one."""

    position: int


@dataclass(frozen=True)
class Started:
    """The first step has begun."""


@dataclass(frozen=True)
class Progress:
    """``step`` of ``steps`` are done for picture ``index`` of the request."""

    index: int
    step: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """A rough picture, as a file, of picture ``index`` after ``step`` steps."""

    index: int
    step: int
    data: bytes


@dataclass(frozen=True)
class Finished:
    """All pictures are done; times in microseconds, ``cached`` when no model ran."""

    cached: bool
    queue_us: int
    compute_us: int
    cache_us: int


@dataclass(frozen=True)
class Image:
    """A finished picture, as a file. Sizes are the file's own, in pixels."""

    index: int
    seed: int
    data: bytes
    width: int
    height: int
    cached: bool


Event = Queued | Started | Progress | Preview | Image | Finished


class Mailbox:
    """Events between the engine, which never waits, and a reader, who may be slow.

    Progress and previews are replaced by newer ones of the same picture that come before they were read, so that at
    most one of each, and each picture once, is ever held. Nothing else is dropped, and order is kept.
    """

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._latest: dict[tuple[type[Event], int], Event] = {}
        self._filled = asyncio.Event()
        self._error: BaseException | None = None

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: Event) -> None:
        """Keeps the event for the reader. Never blocks."""
        if isinstance(event, Progress | Preview):
            key = (type(event), event.index)
            stale = self._latest.get(key)
            if stale is not None:
                self._events.remove(stale)
            self._latest[key] = event
        self._events.append(event)
        self._filled.set()

    def fail(self, error: BaseException) -> None:
        """Ends the reader with ``error`` after what it has not read yet."""
        if self._error is None:
            self._error = error
        self._filled.set()

    async def read(self) -> AsyncIterator[Event]:
        """Events in order, the last of them Finished.

        Raises:
            BaseException: what :meth:`fail` was given.
        """
        while True:
            while self._events:
                event = self._events.popleft()
                if isinstance(event, Progress | Preview):
                    del self._latest[(type(event), event.index)]
                yield event
                if isinstance(event, Finished):
                    return
            if self._error is not None:
                raise self._error
            self._filled.clear()
            await self._filled.wait()
