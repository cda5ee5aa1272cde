"""How far a job is, on standard error: a bar for each step in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

_EVERY_SECONDS = 10.0


class Progress:
    """Called with a step's name, how much of it is done, and of how much; a share of 1 where nothing is counted."""

    def __init__(self, console: Console | None = None, unit: str = "") -> None:
        """unit: of what is counted; "MB" for bytes, counted in bytes."""
        self._console = console or Console(stderr=True)
        self._per = 1e6 if unit == "MB" else 1.0
        self._unit = f" {unit}" if unit else ""
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}")
        self._bars = Bars(*columns, console=self._console, disable=not self._console.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        # When a step was first reported, and how much of it an earlier run had done by then.
        self._began: dict[str, tuple[float, float]] = {}
        self._said_at = time.monotonic()

    def __call__(self, step: str, done: float, total: float = 1.0) -> None:
        now = time.monotonic()
        if step not in self._began:
            self._began[step] = now, done
            self._tasks[step] = self._bars.add_task(step, said="")
        said = self.said(step, done, total, now)
        self._bars.update(self._tasks[step], completed=done, total=total, said=said)
        if self._bars.disable and (done >= total or now - self._said_at >= _EVERY_SECONDS):
            self._said_at = now
            self._console.print(f"{step}: {said}", highlight=False, soft_wrap=True)

    def said(self, step: str, done: float, total: float, now: float) -> str:
        """How far a step is, in words; rate and time left are those of this run."""
        began, before = self._began[step]
        rate = (done - before) / max(now - began, 1e-6)
        left = round((total - done) / rate) if rate else 0
        time_left = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        if total == 1.0:
            return f"{min(done, 1.0):.0%}, {time_left}"
        amounts = (f"{number / self._per:,.0f}" for number in (done, total, rate))
        share = int(100 * done // max(total, 1))
        return "{} of {}{unit} ({share} %), {}/s, {left}".format(*amounts, unit=self._unit, share=share, left=time_left)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
