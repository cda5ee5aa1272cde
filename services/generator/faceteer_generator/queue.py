"""Which job the model runs next, and whether there is room for more: plain data, without asyncio or a model.

All work is jobs: an image, an inversion, the embedding of a prompt. A request waits for one or more of them, and jobs
of equal keys are one job, however many requests wait for it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any, ClassVar

from faceteer_runtime.errors import QueueFull
from faceteer_runtime.metrics import Metrics

_MIN_RETRY_S = 0.05


class Request(ABC):
    """Who waits for jobs.

    Attributes:
        waited_s: seconds from here to the first call of the model; 0 before that.
        compute_s: seconds in which the model worked on its jobs.
    """

    def __init__(self) -> None:
        self._submitted = time.perf_counter()
        self._started = False
        self.waited_s = 0.0
        self.compute_s = 0.0

    def start(self) -> bool:
        """Called whenever the model takes one of the jobs; whether it was the first time."""
        if self._started:
            return False
        self._started = True
        self.waited_s = time.perf_counter() - self._submitted
        return True

    @abstractmethod
    def deliver(self, index: int, result: Any) -> None:
        """The job that this request calls ``index`` is done."""

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """One of the jobs cannot be done, and the request has been taken out of the queue."""


@dataclass(eq=False)
class Job:
    """Calls of the model, one after another, for all requests that want exactly this.

    Attributes:
        key: content-addressed name of the result.
        calls: how many there will be, as far as is known at the start.
        watchers: who waits, and under which index.
        task: has ``done`` and ``calls_left``; None before the first call.
    """

    # Places in a turn are counted separately for each lane.
    lane: ClassVar[str] = ""

    key: str
    calls: int
    watchers: list[tuple[Request, int]] = field(default_factory=list, init=False)
    task: Any = field(default=None, init=False)

    @property
    def done(self) -> bool:
        """Whether the model has done its part."""
        return self.task is not None and self.task.done

    @property
    def calls_left(self) -> int:
        """Calls of the model still to be made, as far as is known."""
        return self.calls if self.task is None else self.task.calls_left


class Queue:
    """All jobs that are not delivered yet, by the requests that wait for them.

    Args:
        max_batch: most jobs of a lane in one turn.
        max_queue: most jobs beyond those; more are refused.
        metrics: where to report, under the name "generator".
    """

    def __init__(self, max_batch: int, max_queue: int, metrics: Metrics | None = None) -> None:
        metrics = metrics or Metrics()
        self.max_batch = max_batch
        self.capacity = max_batch + max_queue
        # Requests in order of arrival, with the jobs that each still waits for.
        self._lines: dict[Request, list[Job]] = {}
        self._jobs: dict[str, Job] = {}
        self._turn_s = 0.0
        self._depth = metrics.queue_depth.labels("generator")
        self._refused = metrics.queue_refused.labels("generator")
        self._queue_seconds = metrics.queue_seconds.labels("generator")

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def requests(self) -> list[Request]:
        """Those that wait for something, in order of arrival."""
        return list(self._lines)

    def join(self, request: Request, jobs: Sequence[tuple[int, Job]]) -> None:
        """Adds a request with its jobs and their indices; those already running for others are shared.

        Raises:
            QueueFull: there is no room for the new ones; ``retry_after_s`` is an estimate of when there is.
        """
        new = {job.key for _, job in jobs} - self._jobs.keys()
        if len(self._jobs) + len(new) > self.capacity:
            self._refused.inc()
            raise QueueFull(self._retry_after_s())
        shared = [(index, self._jobs.setdefault(job.key, job)) for index, job in jobs]
        self._lines[request] = [job for _, job in shared]
        for index, job in shared:
            job.watchers.append((request, index))
        self._measure()

    def leave(self, request: Request) -> None:
        """Takes a request out, and the jobs that nobody else waits for. Idempotent."""
        for job in self._lines.pop(request, ()):
            job.watchers = [(other, index) for other, index in job.watchers if other is not request]
            if not job.watchers:
                self._forget(job)

    def next_turn(self) -> list[Job]:
        """The jobs that get a call of the model each: every request's first, in order of arrival, then every one's
        second, and so on, up to ``max_batch`` of each lane. Empty when there is nothing to do."""
        lines = [[job for job in line if not job.done] for line in self._lines.values()]
        turn: dict[Job, None] = {}
        taken: Counter[str] = Counter()
        for job in chain.from_iterable(zip_longest(*lines)):
            if job is not None and job not in turn and taken[job.lane] < self.max_batch:
                turn[job] = None
                taken[job.lane] += 1
        return list(turn)

    def start(self, jobs: Iterable[Job]) -> None:
        """Tells the requests behind these jobs that the model has taken them; again for those that joined since."""
        for job in jobs:
            for request, _ in job.watchers:
                if request.start():
                    self._queue_seconds.observe(request.waited_s)

    def turn_took(self, seconds: float) -> None:
        """Reports how long a turn was, for estimates."""
        self._turn_s = seconds if self._turn_s == 0.0 else 0.8 * self._turn_s + 0.2 * seconds

    def finish(self, job: Job, result: Any) -> None:
        """Delivers a job to those that wait for it, and takes it out."""
        self._forget(job)
        self.start([job])
        for request, index in job.watchers:
            line = self._lines.get(request, [])
            if job in line:
                line.remove(job)
            if not line:
                self._lines.pop(request, None)
            request.deliver(index, result)

    def fail(self, job: Job, error: BaseException) -> None:
        """Fails every request that waits for a job, with all its other jobs."""
        for request in {request: None for request, _ in job.watchers}:
            self.fail_request(request, error)

    def fail_request(self, request: Request, error: BaseException) -> None:
        """Takes a request out and tells it why."""
        self.leave(request)
        request.fail(error)

    def _forget(self, job: Job) -> None:
        # Another of the same key may have begun after everybody had left this one.
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]
            self._measure()

    def _measure(self) -> None:
        self._depth.set(max(0, len(self._jobs) - self.max_batch))

    def _retry_after_s(self) -> float:
        # The refused request needs the first places that get free, so a mean job's time, not that of all of them.
        calls = sum(job.calls_left for job in self._jobs.values()) / max(1, len(self._jobs))
        return max(_MIN_RETRY_S, calls * self._turn_s)


def charge(jobs: Iterable[Job], seconds: float) -> None:
    """Adds the model's time to every request behind these jobs, once each."""
    for request in {request: None for job in jobs for request, _ in job.watchers}:
        request.compute_s += seconds
