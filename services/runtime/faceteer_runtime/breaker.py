"""A circuit breaker: stops calling what does not answer, and tries again from time to time."""

from __future__ import annotations

import time
from collections.abc import Callable


class Breaker:
    """Opens after ``threshold`` failures in a row; then lets one probe through after each pause.

    The pause doubles with every failed probe, from ``pause_s`` up to ``max_pause_s``.
    """

    def __init__(
        self,
        *,
        threshold: int = 3,
        pause_s: float = 0.5,
        max_pause_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[str], None] = lambda state: None,
    ) -> None:
        self._threshold = threshold
        self._first_pause_s = pause_s
        self._max_pause_s = max_pause_s
        self._clock = clock
        self._on_change = on_change
        self._failures = 0
        self._pause_s = pause_s
        self._open_until = 0.0
        self.state = "closed"
        """"closed", "open" or "half_open"."""

    def allow(self) -> bool:
        """Whether to try now. In the half-open state exactly one caller gets True."""
        if self.state == "closed":
            return True
        if self.state == "open" and self._clock() >= self._open_until:
            self._to("half_open")
            return True
        return False

    def release(self) -> None:
        """What was allowed was not tried after all: the next caller may probe."""
        if self.state == "half_open":
            self._to("open")

    def success(self) -> None:
        """What was tried worked."""
        self._failures = 0
        self._pause_s = self._first_pause_s
        if self.state != "closed":
            self._to("closed")

    def failure(self) -> None:
        """What was tried did not work."""
        self._failures += 1
        if self.state == "half_open":
            self._pause_s = min(2 * self._pause_s, self._max_pause_s)
        elif self.state == "open" or self._failures < self._threshold:
            return
        self._open_until = self._clock() + self._pause_s
        self._to("open")

    def _to(self, state: str) -> None:
        self.state = state
        self._on_change(state)
