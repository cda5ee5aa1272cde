"""Progress: in a notebook its own bar; on a terminal rich's where rich is installed, else one plain line of stderr."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

#: True shows a bar; a function is called with (done, total) instead, total None when unknown.
ProgressOption: TypeAlias = "bool | Callable[[int, int | None], Any]"


class _Display(Protocol):
    def show(self, words: str, done: int, total: int | None) -> None: ...

    def close(self) -> None: ...


class Bar:
    """One operation's progress, as the caller wants it. Use as a context manager; shows nothing where there is neither
    a notebook nor a terminal. Who updates it also calls ``callback``."""

    def __init__(self, option: ProgressOption, title: str, total: int | None = None) -> None:
        self.callback = option if callable(option) else None
        self._display: _Display | None = None
        self._wanted = option is True
        self._words, self._done, self._total = title, 0, total

    def __enter__(self) -> Bar:
        if self._wanted:
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


def _display() -> _Display | None:
    if (display := _notebook()) is not None:
        return _Notebook(display)
    if not sys.stderr.isatty():
        return None
    try:
        return _Rich()
    except ImportError:
        return _Plain()


def _notebook() -> Callable[..., Any] | None:
    """IPython's ``display`` where a notebook's kernel runs this, and None elsewhere. Nothing is imported for it."""
    ipython = sys.modules.get("IPython")
    if ipython is None or getattr(ipython.get_ipython(), "kernel", None) is None:
        return None
    display: Callable[..., Any] = ipython.display.display
    return display


def _line(words: str, done: int, total: int | None) -> str:
    return f"{words} {done}/{total}" if total else f"{words} {done}" if done else words


class _Progress:
    """What a notebook shows: a bar, or words where it shows no HTML."""

    def __init__(self, words: str, done: int, total: int | None) -> None:
        self._words, self._done, self._total = _line(words, done, total), done, total

    def _repr_html_(self) -> str:
        share = f' value="{self._done}" max="{self._total}"' if self._total else ""
        return f"<progress{share}></progress> {html.escape(self._words)}"

    def __repr__(self) -> str:
        return self._words


class _Notebook:
    """One output of the cell, which is replaced as things go on; the last one stays."""

    _SECONDS = 0.1  # between two of them: each is a message to the browser

    def __init__(self, display: Callable[..., Any]) -> None:
        self._display = display
        self._output: Any = None
        self._last = _Progress("", 0, None)
        self._shown_at = 0.0

    def show(self, words: str, done: int, total: int | None) -> None:
        self._last = _Progress(words, done, total)
        now = time.monotonic()
        if self._output is None:
            self._output = self._display(self._last, display_id=True)
        elif now - self._shown_at >= self._SECONDS:
            self._output.update(self._last)
        else:
            return
        self._shown_at = now

    def close(self) -> None:
        self._output.update(self._last)


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
        line = _line(words, done, total)
        self._longest = max(self._longest, len(line))
        sys.stderr.write(f"\r{line.ljust(self._longest)}")
        sys.stderr.flush()

    def close(self) -> None:
        sys.stderr.write(f"\r{' ' * self._longest}\r")
        sys.stderr.flush()
