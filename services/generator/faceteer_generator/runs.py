"""A request under way, and the pictures it waits for.

Knows nothing of the order in which pictures are drawn; see :mod:`faceteer_generator.engine`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from faceteer_generator.events import Event, Image, Mailbox
from faceteer_generator.requests import Drawing, Format, Generation


@dataclass(eq=False)
class Job:
    """One picture being drawn, for every run that wants exactly it."""

    key: str
    drawing: Drawing
    format: Format
    quality: int
    watchers: list[tuple[Run, int]] = field(default_factory=list)
    picture: Any = None
    steps_done: int = 0
    drawn: bool = False
    preview: asyncio.Task[None] | None = None


class Run:
    """One request under way. Close it when nobody reads its events any more."""

    def __init__(self, leave: Callable[[Run], None], generation: Generation, preview_every: int) -> None:
        self.generation = generation
        self.preview_every = preview_every
        self.jobs: list[Job] = []
        self.mailbox = Mailbox()
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.left = 0
        self.compute_s = 0.0
        self.cache_us = 0
        # Pictures out of the cache, kept back until Started has been said.
        self.cached: list[Image] = []
        self._leave = leave

    def events(self) -> AsyncIterator[Event]:
        """Queued, Started, then Progress, Preview and Image, and Finished last.

        Raises:
            Exception: what stopped one of the pictures; Draining when the server stops.
        """
        return self.mailbox.read()

    @property
    def waited_us(self) -> int:
        """Microseconds from submit to the first step; 0 before that."""
        return 0 if self.started is None else int((self.started - self.submitted) * 1e6)

    def close(self) -> None:
        """Stops drawing what nobody else waits for, from the next step on. Idempotent."""
        self._leave(self)
