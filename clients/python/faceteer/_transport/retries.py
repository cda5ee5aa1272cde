"""Deadlines, and when a failed call is worth another try. The caller sends and sleeps."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from faceteer._errors import (
    DeadlineExceededError,
    FaceteerError,
    ResourceExhaustedError,
    ServerUnreachableError,
    UnavailableError,
    invalid,
)


@dataclass(frozen=True)
class Timeouts:
    """Default deadlines in seconds, each for a whole operation with its retries; None waits for ever.

    Attributes:
        query: status, features, labels.
        open: opening, encoding texts, a report, a transfer, a diff.
        render: drawing.
        bulk: the longest that :meth:`Client.encode` waits without a single answer.
    """

    query: float | None = 15.0
    open: float | None = 60.0
    render: float | None = 600.0
    bulk: float | None = 120.0

    @classmethod
    def of(cls, given: float | Timeouts | None) -> Timeouts:
        """One number for everything, a whole :class:`Timeouts`, or None for the defaults."""
        if given is None:
            return cls()
        if isinstance(given, Timeouts):
            return given
        check_timeout(given)
        return cls(given, given, given, given)


@dataclass(frozen=True)
class Retries:
    """When to try again: after UNAVAILABLE, and after RESOURCE_EXHAUSTED when the server says when to come back.

    A server that is busy and says when to come back is well: it is asked again until the operation's deadline, however
    often. ``attempts`` bounds the tries after UNAVAILABLE.

    The wait before retry n is ``first * factor ** n``, at most ``longest`` seconds, times a random share of it between
    one half and one (so that clients do not come back in step), and never less than the server asked for.

    Attributes:
        attempts: tries in all, those that a busy server sent away not counted; 1 never retries.
        first: seconds.
        factor: growth of the wait.
        longest: seconds.
    """

    attempts: int = 5
    first: float = 0.1
    factor: float = 2.0
    longest: float = 5.0
    _random: Callable[[], float] = field(default=random.random, repr=False, compare=False)

    @classmethod
    def of(cls, given: int | Retries | None) -> Retries:
        """A number of retries, a whole :class:`Retries`, or None for the defaults."""
        if given is None:
            return cls()
        if isinstance(given, Retries):
            return given
        if given < 0:
            raise invalid("retries", f"{given} is negative; 0 never tries again")
        return cls(attempts=int(given) + 1)

    def wait(self, retry: int, error: FaceteerError) -> float | None:
        """Seconds to wait before retry ``retry`` (0 is the first) after ``error``, or None when it is final."""
        if not isinstance(error, UnavailableError | ResourceExhaustedError):
            return None
        asked = error.retry_after
        busy = is_busy(error)
        if isinstance(error, ResourceExhaustedError) and not busy:
            return None
        if self.attempts == 1 or (retry + 1 >= self.attempts and not busy):
            return None
        backoff = min(self.longest, self.first * self.factor**retry) * (0.5 + 0.5 * self._random())
        if asked is None:
            return backoff
        # Clients rejected at the same time got the same delay: spread them over another quarter of it.
        return max(backoff, asked * (1.0 + 0.25 * self._random()))


class Attempts:
    """One operation's deadline and its count of retries."""

    def __init__(self, retries: Retries, timeout: float | None) -> None:
        self._retries = retries
        self._ends = None if timeout is None else time.monotonic() + timeout
        self._retry = self._sent_away = 0
        self._unreachable: ServerUnreachableError | None = None

    @property
    def remaining(self) -> float | None:
        """Seconds left, never negative; None without a deadline."""
        return None if self._ends is None else max(0.0, self._ends - time.monotonic())

    def progress(self) -> None:
        """Something arrived: the next failure is a first one again."""
        self._retry = self._sent_away = 0
        self._unreachable = None

    def pause(self, error: FaceteerError) -> float:
        """Seconds to wait before the next try after ``error``; raises it when there is no next try."""
        if isinstance(error, ServerUnreachableError):
            self._unreachable = error
        elif isinstance(error, DeadlineExceededError) and self._unreachable is not None:
            # The deadline passed while connecting once more: that nothing answers says more.
            raise self._unreachable from error
        busy = is_busy(error)
        wait = self._retries.wait(self._sent_away if busy else self._retry, error)
        remaining = self.remaining
        if wait is None or (remaining is not None and wait >= remaining):
            raise error
        if busy:
            self._sent_away += 1
        else:
            self._retry += 1
        return wait


def is_busy(error: FaceteerError) -> bool:
    """Whether the server is well, has no room, and says when to come back."""
    return isinstance(error, ResourceExhaustedError) and error.retry_after is not None


def check_timeout(timeout: float | None) -> None:
    """Raises InvalidArgumentError unless ``timeout`` is None or a positive number of seconds."""
    if timeout is not None and not timeout > 0:
        raise invalid("timeout", f"{timeout!r} is not a positive number of seconds")
