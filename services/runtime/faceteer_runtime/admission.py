"""Whether new calls are taken, and how many are being answered."""

from __future__ import annotations

import asyncio

from faceteer_runtime.errors import Draining, QueueFull, Starting

_RETRY_S = 0.5


class Admission:
    """The server's phase: starting, then serving, then draining.

    Args:
        max_calls: most calls answered at once.
    """

    def __init__(self, max_calls: int = 1000) -> None:
        self._max_calls = max_calls
        self.phase = "starting"
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self) -> None:
        """Takes calls from now on, unless draining has begun."""
        if self.phase == "starting":
            self.phase = "serving"

    def drain(self) -> None:
        """Takes no more calls."""
        self.phase = "draining"

    def enter(self) -> None:
        """Admits one call.

        Raises:
            Starting, Draining: not now.
            QueueFull: ``max_calls`` are being answered.
        """
        if self.phase != "serving":
            raise Starting() if self.phase == "starting" else Draining()
        if self.in_flight >= self._max_calls:
            raise QueueFull(_RETRY_S)
        self.in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        """One admitted call has ended."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no call is being answered, at most ``timeout_s``; whether that was so."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
