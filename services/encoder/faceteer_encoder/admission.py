"""How many pictures and texts may be in progress at once, from admission to the end of the model.

Calls that bring a fixed number are refused when there is no room; streams wait.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator

from faceteer_runtime.errors import QueueFull

_LEAST_RETRY_S = 0.05


class Capacity:
    """Room for ``limit`` items. Used on the event loop only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._item_s = 0.0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self.taken = 0
        """Items under way."""

    @contextlib.contextmanager
    def holding(self, items: int) -> Iterator[None]:
        """Reserves room for a call's items; when nothing is in progress, for any number.

        Raises:
            QueueFull: there is no room, with an estimate of when there will be.
        """
        if items > 0 and self.taken > 0 and self.taken + items > self._limit:
            raise QueueFull(max(_LEAST_RETRY_S, self.taken * self._item_s))
        self.taken += items
        try:
            yield
        finally:
            self._leave(items)

    @contextlib.asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """Reserves room for one item, as soon as there is some."""
        while self.taken >= self._limit:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    # Woken and cancelled at the same moment: the next one takes its place.
                    self._wake()
                raise
        self.taken += 1
        try:
            yield
        finally:
            self._leave(1)

    def took(self, seconds: float) -> None:
        """Tells how long the model was at work for one item, for estimates."""
        self._item_s = seconds if self._item_s == 0.0 else 0.9 * self._item_s + 0.1 * seconds

    def _leave(self, items: int) -> None:
        self.taken -= items
        for _ in range(items):
            self._wake()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
