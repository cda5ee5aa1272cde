"""How far a job is, on standard error: a bar in a terminal, a line every few seconds elsewhere.

It knows nothing of what is counted.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_EVERY_SECONDS = 10.0


class Counted:
    """Counts towards a total; rate and time left are those of this run, without what was done before it."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._done, self._before = what, total, done, done
        self._start = self._said = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn(what),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]:,.0f}/s"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(what, total=total, completed=done, rate=0.0)

    def __enter__(self) -> Counted:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._say()

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate(now))
        elif now - self._said >= _EVERY_SECONDS:
            self._said = now
            self._say()

    def line(self, now: float) -> str:
        """How far it is, as a sentence."""
        rate = self._rate(now)
        left = int((self._total - self._done) / rate) if rate else 0
        hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
        share = 100 * self._done // max(self._total, 1)
        return (
            f"{self._what}: {self._done:,} of {self._total:,} ({share} %), {rate:,.0f}/s, "
            f"{hours}:{minutes:02}:{seconds:02} left"
        )

    def _rate(self, now: float) -> float:
        return (self._done - self._before) / max(now - self._start, 1e-6)

    def _say(self) -> None:
        print(self.line(time.monotonic()), file=sys.stderr, flush=True)
