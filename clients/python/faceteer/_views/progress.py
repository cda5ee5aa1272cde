"""Progress on a terminal: rich's bar where rich is installed, one plain line of stderr otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

#: True shows a bar; a function is called with (done, total) instead, total None when unknown.
ProgressOption: TypeAlias = "bool | Callable[[int, int | None], Any]"


class _Display(Protocol):
    def show(self, words: str, done: int, total: int | None) -> None: ...

    def close(self) -> None: ...


class Bar:
    """One operation's progress, as the caller wants it. Use as a context manager; shows nothing where there is no
    terminal. Who updates it also calls ``callback``."""

    def __init__(self, option: ProgressOption, title: str, total: int | None = None) -> None:
        self.callback = option if callable(option) else None
        self._display: _Display | None = None
        self._wanted = option is True
        self._words, self._done, self._total = title, 0, total

    def __enter__(self) -> Bar:
        if self._wanted and sys.stderr.isatty():
            self._display = _display()
            self._show()
        return self

    def __exit__(self, *error: object) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None

    def say(self, words: str) -> None:
        """Says what is going on."""
        self._words = words
        self._show()

    def update(self, done: int, total: int | None) -> None:
        """``done`` of ``total`` are done."""
        self._done, self._total = done, total
        self._show()

    def _show(self) -> None:
        if self._display is not None:
            self._display.show(self._words, self._done, self._total)


def _display() -> _Display:
    try:
        return _Rich()
    except ImportError:
        return _Plain()


class _Rich:
    def __init__(self) -> None:
        # rich comes with the command line only: without it there is the plain line.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)
        self._progress.start()

    def show(self, words: str, done: int, total: int | None) -> None:
        self._progress.update(self._task, description=words, completed=done, total=total)

    def close(self) -> None:
        self._progress.stop()


class _Plain:
    def __init__(self) -> None:
        self._longest = 0

    def show(self, words: str, done: int, total: int | None) -> None:
        line = f"{words} {done}/{total}" if total else f"{words} {done}" if done else words
        self._longest = max(self._longest, len(line))
        sys.stderr.write(f"\r{line.ljust(self._longest)}")
        sys.stderr.flush()

    def close(self) -> None:
        sys.stderr.write(f"\r{' ' * self._longest}\r")
        sys.stderr.flush()
