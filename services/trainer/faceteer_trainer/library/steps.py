"""How far a build is, step by step, on standard error: bars in a terminal, a line now and then elsewhere.

Knows nothing of the steps.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_EVERY_SECONDS = 15.0


class Steps:
    """Called with a step's name and the share of it that is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
            self._progress = Progress(*columns, console=console)
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        self._said = 0.0

    def __call__(self, step: str, share: float) -> None:
        now = time.monotonic()
        began = self._began.setdefault(step, now)
        if self._progress is not None:
            if step not in self._tasks:
                self._tasks[step] = self._progress.add_task(step, total=1.0)
            self._progress.update(self._tasks[step], completed=min(share, 1.0))
        elif share >= 1.0 or now - self._said > _EVERY_SECONDS:
            self._said = now
            left = (now - began) / share * (1 - share) if 0 < share < 1 else 0.0
            self._console.print(
                f"{step}: {min(share, 1.0):.0%}, {now - began:.0f} s, {left:.0f} s left", highlight=False
            )

    def __enter__(self) -> Steps:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
