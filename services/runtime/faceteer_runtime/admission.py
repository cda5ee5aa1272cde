"""Whether new calls are taken, and how many are being answered.

Knows nothing of gRPC.
"""

from __future__ import annotations

import asyncio

from faceteer_runtime.errors import Draining, Starting


class Admission:
    """The server's phase: starting, then serving, then draining."""

    def __init__(self) -> None:
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
        """
        if self.phase != "serving":
            raise Starting() if self.phase == "starting" else Draining()
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
