"""One thread for the model, and batches that grow under load.

A batch is formed at the moment when the model thread takes it, from whatever waits then: an idle model takes a single
item at once, a busy one finds more of them. There is no timer.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from faceteer_runtime.errors import Draining, QueueFull
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.outcome import Computed, Failed

T = TypeVar("T")
R = TypeVar("R")

_MIN_RETRY_S = 0.05


class ModelWorker:
    """The one thread on which the model runs: batched and unbatched calls never overlap."""

    def __init__(self, name: str = "model") -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, function: Callable[..., R], *args: Any) -> R:
        """Calls ``function(*args)`` on the thread and returns or raises what it does.

        A caller that is cancelled before the call began cancels it too; a call that has begun runs on, and its result
        is dropped.

        Raises:
            Draining: the worker is closed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()

        def job() -> None:
            if future.cancelled():
                return
            try:
                result = function(*args)
            except BaseException as error:
                _tell(loop, _fail, future, error)
            else:
                _tell(loop, _resolve, future, result)

        self.post(job)
        return await future

    def post(self, job: Callable[[], None]) -> None:
        """Queues a job that reports its own outcome and never raises. May be called from any thread.

        Raises:
            Draining: the worker is closed.
        """
        if self._closed:
            raise Draining()
        self._jobs.put(job)

    @property
    def idle(self) -> bool:
        """Whether no job waits (one may be running)."""
        return self._jobs.empty()

    def close(self, timeout_s: float = 10.0) -> None:
        """Lets queued jobs finish and ends the thread; waits at most ``timeout_s``."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            # Do not keep the last batch's arrays alive while waiting.
            del job


class _Item(Generic[T, R]):
    __slots__ = ("future", "submitted", "value")

    def __init__(self, value: T, future: asyncio.Future[Computed[R]]) -> None:
        self.value = value
        self.future = future
        self.submitted = time.perf_counter()


class MicroBatcher(Generic[T, R]):
    """Collects items into batches for one ``run`` function.

    Args:
        run: items in, results out, aligned; called on the worker's thread.
        max_batch: most items in a call of ``run``.
        max_queue: most items that wait; one more raises QueueFull at once.
        worker: the model's thread, shared by all that use the model.
        name: of this batcher, for metrics.
        metrics: where to report.
    """

    def __init__(
        self,
        run: Callable[[list[T]], list[R]],
        *,
        max_batch: int,
        max_queue: int,
        worker: ModelWorker,
        name: str,
        metrics: Metrics | None = None,
    ) -> None:
        if max_batch < 1 or max_queue < 1:
            raise ValueError("max_batch and max_queue must be at least 1")
        metrics = metrics or Metrics()
        self._run = run
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._worker = worker
        self._waiting: deque[_Item[T, R]] = deque()
        # Guards _waiting and _scheduled, which the loop and the model's thread both change.
        self._lock = threading.Lock()
        self._scheduled = False
        self._closed = False
        self._batch_s = 0.0
        self._depth = metrics.queue_depth.labels(name)
        self._refused = metrics.queue_refused.labels(name)
        self._sizes = metrics.batch_size.labels(name)
        self._queue_seconds = metrics.queue_seconds.labels(name)
        self._model_seconds = metrics.model_seconds.labels(name)

    async def submit(self, item: T) -> Computed[R]:
        """Waits for the item's result.

        Raises:
            QueueFull: ``max_queue`` items wait already; at once, with an estimate of when to come back.
            Draining: the batcher or its worker is closed.
            Exception: whatever ``run`` raised for this item alone.
        """
        if self._closed:
            raise Draining()
        entry: _Item[T, R] = _Item(item, asyncio.get_running_loop().create_future())
        with self._lock:
            if len(self._waiting) >= self._max_queue:
                self._refused.inc()
                raise QueueFull(self._retry_after_s())
            self._waiting.append(entry)
            wake, self._scheduled = not self._scheduled, True
        self._depth.set(len(self._waiting))
        try:
            if wake:
                self._worker.post(self._step)
            return await entry.future
        except Draining:
            self._fail_rest()
            raise
        except asyncio.CancelledError:
            self._leave(entry)
            raise

    @property
    def depth(self) -> int:
        """Items waiting now."""
        return len(self._waiting)

    def close(self) -> None:
        """Refuses new items and answers those that wait with Draining; a running batch finishes. Call on the loop."""
        self._closed = True
        with self._lock:
            left, self._waiting = list(self._waiting), deque()
        for entry in left:
            _fail(entry.future, Draining())

    def _leave(self, entry: _Item[T, R]) -> None:
        """Takes a cancelled caller's item out of the queue, so that it neither runs nor holds a place."""
        with self._lock:
            if entry in self._waiting:
                self._waiting.remove(entry)

    def _retry_after_s(self) -> float:
        batches = len(self._waiting) / self._max_batch + 1
        return max(_MIN_RETRY_S, batches * self._batch_s)

    # -- on the model's thread ---------------------------------------------------------------

    def _step(self) -> None:
        """Takes what waits, up to max_batch, runs it, and queues itself again behind other users of the worker."""
        with self._lock:
            batch = [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]
        batch = [entry for entry in batch if not entry.future.cancelled()]
        if batch:
            self._run_batch(batch)
        with self._lock:
            self._scheduled = bool(self._waiting)
            again = self._scheduled
        if again:
            try:
                self._worker.post(self._step)
            except Draining:
                self._fail_rest()

    def _run_batch(self, batch: list[_Item[T, R]]) -> None:
        started = time.perf_counter()
        outcomes = self._outcomes([entry.value for entry in batch])
        seconds = time.perf_counter() - started
        self._batch_s = seconds if self._batch_s == 0.0 else 0.8 * self._batch_s + 0.2 * seconds
        loop = batch[0].future.get_loop()
        _tell(loop, self._deliver, batch, outcomes, started, seconds)

    def _outcomes(self, values: list[T]) -> list[R | Failed]:
        """Results aligned with ``values``; when the batch fails, each item alone, so that a bad one fails alone."""
        try:
            results = self._run(values)
            if len(results) != len(values):
                raise RuntimeError(f"{len(values)} items in, {len(results)} results out")
            return list(results)
        except BaseException as error:
            if len(values) == 1:
                return [Failed(error)]
        return [self._outcomes([value])[0] for value in values]

    def _fail_rest(self) -> None:
        """The worker is closed: nothing that waits will ever run."""
        with self._lock:
            left, self._waiting = list(self._waiting), deque()
            self._scheduled = False
        for entry in left:
            _tell(entry.future.get_loop(), _fail, entry.future, Draining())

    # -- back on the loop --------------------------------------------------------------------

    def _deliver(self, batch: list[_Item[T, R]], outcomes: list[R | Failed], started: float, seconds: float) -> None:
        compute_us = int(seconds * 1e6)
        for entry, outcome in zip(batch, outcomes, strict=True):
            waited = started - entry.submitted
            self._queue_seconds.observe(waited)
            if isinstance(outcome, Failed):
                _fail(entry.future, outcome.error)
            else:
                _resolve(entry.future, Computed(outcome, int(waited * 1e6), compute_us))
        self._sizes.observe(len(batch))
        self._model_seconds.observe(seconds)
        self._depth.set(len(self._waiting))


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if future.done():
        return
    if isinstance(error, StopIteration | KeyboardInterrupt | SystemExit | asyncio.CancelledError):
        # A future cannot carry StopIteration, and the others would end more than this call.
        wrapped = RuntimeError(f"{type(error).__name__} in a model call")
        wrapped.__cause__ = error
        error = wrapped
    future.set_exception(error)


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    # RuntimeError: the loop is closed, and nobody waits any more.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)
