"""How many pictures and texts may be under way at once, from admission to the end of the model.

Knows nothing of what they are. Calls that bring a fixed number are refused when there is no room; streams wait.
"""

from __future__ import annotations

import asyncio
from collections import deque

from faceteer_runtime.errors import QueueFull

_LEAST_RETRY_S = 0.05


class Room:
    """Places for ``limit`` items. Used on the event loop only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._item_s = 0.0
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def taken(self) -> int:
        """Items under way."""
        return self._taken

    def take(self, items: int) -> None:
        """Takes places for a call's items: any number when nothing is under way, none at any time.

        Raises:
            QueueFull: there is no room, with an estimate of when there will be.
        """
        if items > 0 and self._taken > 0 and self._taken + items > self._limit:
            raise QueueFull(max(_LEAST_RETRY_S, self._taken * self._item_s))
        self._taken += items

    async def wait(self) -> None:
        """Takes one place, as soon as there is one."""
        while self._taken >= self._limit:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    # Woken and cancelled at once: the place is somebody else's now.
                    self._wake()
                raise
        self._taken += 1

    def leave(self, items: int = 1) -> None:
        """Gives places back."""
        self._taken -= items
        for _ in range(items):
            self._wake()

    def took(self, seconds: float) -> None:
        """Tells how long the model was at work for one item, for estimates."""
        self._item_s = seconds if self._item_s == 0.0 else 0.9 * self._item_s + 0.1 * seconds

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
