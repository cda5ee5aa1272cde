"""Batches grow under load; nobody waits when idle; each item succeeds or fails for itself."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque

import pytest
from faceteer_runtime.batching import MicroBatcher, ModelWorker
from faceteer_runtime.errors import Draining, QueueFull
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.outcome import Computed


class Model:
    """Squares numbers; keeps what it was asked; can be held."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.inside = 0
        self.most_inside = 0

    def __call__(self, items: list[int]) -> list[int]:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.batches.append(list(items))
        try:
            assert self.gate.wait(10)
            if -1 in items:
                raise ValueError("cannot square -1")
            return [item * item for item in items]
        finally:
            self.inside -= 1


@pytest.fixture
def worker():
    worker = ModelWorker("test-model")
    yield worker
    worker.close()


@pytest.fixture
def model() -> Model:
    return Model()


def batcher(model, worker: ModelWorker, *, max_batch: int = 8, max_queue: int = 64, **options) -> MicroBatcher:
    return MicroBatcher(model, max_batch=max_batch, max_queue=max_queue, worker=worker, name="test", **options)


async def until(condition, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (the condition is set on another thread)
            await asyncio.sleep(0.001)


async def hold(model: Model, squares: MicroBatcher) -> asyncio.Task:
    """Occupies the model with one item, so that others queue up behind it."""
    model.gate.clear()
    first = asyncio.ensure_future(squares.submit(0))
    await until(lambda: model.inside == 1)
    return first


async def submit(squares: MicroBatcher, *items: int) -> list[asyncio.Task]:
    tasks = [asyncio.ensure_future(squares.submit(item)) for item in items]
    await asyncio.sleep(0)
    return tasks


async def test_an_idle_model_takes_a_single_item_at_once(model: Model, worker: ModelWorker) -> None:
    squares = batcher(model, worker)
    await squares.submit(1)
    began = time.perf_counter()
    result = await squares.submit(3)
    assert result.value == 9
    assert model.batches == [[1], [3]]
    # No timer: far below any batching window one would choose, yet generous to a busy machine.
    assert time.perf_counter() - began < 0.5


async def test_a_busy_model_finds_a_batch_when_it_comes_back(model: Model, worker: ModelWorker) -> None:
    squares = batcher(model, worker, max_batch=4)
    first = await hold(model, squares)
    rest = await submit(squares, *range(1, 11))
    model.gate.set()
    assert [result.value for result in await asyncio.gather(first, *rest)] == [n * n for n in range(11)]
    assert [len(batch) for batch in model.batches] == [1, 4, 4, 2]
    assert [item for batch in model.batches for item in batch] == list(range(11))


async def test_times_tell_waiting_from_computing(model: Model, worker: ModelWorker) -> None:
    squares = batcher(model, worker)
    first = await hold(model, squares)
    (second,) = await submit(squares, 2)
    await asyncio.sleep(0.05)
    model.gate.set()
    held, waited = await first, await second
    assert isinstance(held, Computed)
    assert held.compute_us >= 50_000
    assert waited.queue_us >= 50_000
    assert waited.compute_us < held.compute_us


async def test_a_cancelled_caller_leaves_before_the_batch_runs_and_the_rest_are_answered(
    model: Model, worker: ModelWorker
) -> None:
    # Mistake 3: one cancelled waiter left the rest of its batch hanging for ever.
    squares = batcher(model, worker)
    first = await hold(model, squares)
    a, b, c = await submit(squares, 1, 2, 3)
    b.cancel()
    with pytest.raises(asyncio.CancelledError):
        await b
    assert squares.depth == 2
    model.gate.set()
    async with asyncio.timeout(5):
        assert [r.value for r in await asyncio.gather(first, a, c)] == [0, 1, 9]
    assert model.batches == [[0], [1, 3]]


async def test_a_caller_cancelled_while_its_batch_runs_does_not_disturb_the_others(
    model: Model, worker: ModelWorker
) -> None:
    squares = batcher(model, worker)
    first = await hold(model, squares)
    a, b = await submit(squares, 1, 2)
    first.cancel()
    a.cancel()
    model.gate.set()
    async with asyncio.timeout(5):
        assert (await b).value == 4
    assert (await squares.submit(5)).value == 25


async def test_everybody_leaving_leaves_a_batcher_that_works(model: Model, worker: ModelWorker) -> None:
    squares = batcher(model, worker)
    first = await hold(model, squares)
    tasks = await submit(squares, 1, 2, 3)
    for task in (first, *tasks):
        task.cancel()
    await asyncio.gather(first, *tasks, return_exceptions=True)
    model.gate.set()
    async with asyncio.timeout(5):
        assert (await squares.submit(7)).value == 49
    assert [0] in model.batches
    assert [7] in model.batches
    assert len(model.batches) == 2


async def test_a_failing_item_is_tried_alone_and_fails_alone(model: Model, worker: ModelWorker) -> None:
    squares = batcher(model, worker)
    first = await hold(model, squares)
    good, bad, also_good = await submit(squares, 2, -1, 3)
    model.gate.set()
    assert [(await task).value for task in (first, good, also_good)] == [0, 4, 9]
    with pytest.raises(ValueError, match="cannot square -1"):
        await bad
    assert model.batches == [[0], [2, -1, 3], [2], [-1], [3]]


async def test_a_model_that_loses_items_is_noticed(worker: ModelWorker) -> None:
    squares = batcher(lambda items: [], worker)
    with pytest.raises(RuntimeError, match="1 items in, 0 results out"):
        await squares.submit(1)


@pytest.mark.parametrize("error", [StopIteration(), SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
async def test_exceptions_that_would_end_more_than_the_call_are_contained(error, worker: ModelWorker) -> None:
    def fail(items: list[int]) -> list[int]:
        raise error

    squares = batcher(fail, worker)
    with pytest.raises(RuntimeError, match=type(error).__name__):
        await squares.submit(1)
    with pytest.raises(RuntimeError, match=type(error).__name__):
        await worker.run(fail, [1])
    assert await worker.run(len, [1, 2]) == 2


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(model: Model, worker: ModelWorker) -> None:
    metrics = Metrics()
    squares = batcher(model, worker, max_batch=2, max_queue=3, metrics=metrics)
    first = await hold(model, squares)
    waiting = await submit(squares, 1, 2, 3)
    began = time.perf_counter()
    with pytest.raises(QueueFull) as caught:
        await squares.submit(4)
    assert time.perf_counter() - began < 0.5
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0
    assert metrics.value("faceteer_queue_refused_total", batcher="test") == 1
    model.gate.set()
    await asyncio.gather(first, *waiting)


async def test_a_place_that_a_cancelled_caller_held_is_free_again(model: Model, worker: ModelWorker) -> None:
    squares = batcher(model, worker, max_queue=1)
    first = await hold(model, squares)
    (a,) = await submit(squares, 1)
    a.cancel()
    await asyncio.gather(a, return_exceptions=True)
    (b,) = await submit(squares, 2)
    model.gate.set()
    assert [(await task).value for task in (first, b)] == [0, 4]


async def test_it_works_right_after_a_burst(model: Model, worker: ModelWorker) -> None:
    # Mistake 9: a server that stayed dead after an overload burst.
    metrics = Metrics()
    squares = batcher(model, worker, max_batch=4, max_queue=8, metrics=metrics)
    first = await hold(model, squares)
    burst = await submit(squares, *range(500))
    outcomes_soon = asyncio.gather(*burst, return_exceptions=True)
    model.gate.set()
    async with asyncio.timeout(10):
        await first
        outcomes = await outcomes_soon
        assert sum(isinstance(outcome, QueueFull) for outcome in outcomes) == 492
        assert [o.value for o in outcomes if not isinstance(o, QueueFull)] == [n * n for n in range(8)]
        assert (await squares.submit(9)).value == 81
    assert squares.depth == 0
    assert metrics.value("faceteer_queue_depth", batcher="test") == 0


async def test_batches_and_single_calls_on_one_worker_never_overlap(model: Model, worker: ModelWorker) -> None:
    squares, cubes = batcher(model, worker, max_batch=2), batcher(model, worker, max_batch=3)
    results = await asyncio.gather(
        *(squares.submit(n) for n in range(20)),
        *(cubes.submit(n) for n in range(20)),
        *(worker.run(model, [n]) for n in range(20)),
    )
    assert len(results) == 60
    assert model.most_inside == 1


async def test_two_batchers_on_one_worker_take_turns(model: Model, worker: ModelWorker) -> None:
    one, two = batcher(model, worker, max_batch=1), batcher(model, worker, max_batch=1)
    first = await hold(model, one)
    tasks = [*await submit(one, 10, 11, 12), *await submit(two, 20, 21, 22)]
    model.gate.set()
    await asyncio.gather(first, *tasks)
    assert model.batches == [[0], [20], [10], [21], [11], [22], [12]]


async def test_the_loop_stays_free_while_the_model_runs(worker: ModelWorker) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.005)
            ticks += 1

    ticking = asyncio.ensure_future(tick())
    await worker.run(time.sleep, 0.2)
    ticking.cancel()
    assert ticks >= 5


async def test_a_call_cancelled_before_it_began_never_runs(worker: ModelWorker) -> None:
    gate, ran = threading.Event(), []
    first = asyncio.ensure_future(worker.run(gate.wait, 10))
    second = asyncio.ensure_future(worker.run(ran.append, 1))
    await asyncio.sleep(0.01)
    second.cancel()
    gate.set()
    assert await first
    await worker.run(ran.append, 2)
    assert ran == [2]


async def test_closing_answers_those_who_wait_and_refuses_the_rest(model: Model, worker: ModelWorker) -> None:
    squares = batcher(model, worker)
    first = await hold(model, squares)
    (waiting,) = await submit(squares, 1)
    squares.close()
    with pytest.raises(Draining):
        await waiting
    with pytest.raises(Draining):
        await squares.submit(2)
    model.gate.set()
    assert (await first).value == 0


async def test_a_closed_worker_leaves_nobody_hanging(model: Model) -> None:
    worker = ModelWorker()
    squares = batcher(model, worker, max_batch=1)
    first = await hold(model, squares)
    waiting = await submit(squares, 1, 2)
    threading.Timer(0.05, model.gate.set).start()
    await asyncio.to_thread(worker.close)
    async with asyncio.timeout(5):
        assert (await first).value == 0
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, Draining) for outcome in outcomes)
    with pytest.raises(Draining):
        await squares.submit(3)
    with pytest.raises(Draining):
        await worker.run(len, [])
    assert squares.depth == 0


async def test_sizes_and_times_are_measured(model: Model, worker: ModelWorker) -> None:
    metrics = Metrics()
    squares = batcher(model, worker, max_batch=4, metrics=metrics)
    first = await hold(model, squares)
    tasks = await submit(squares, 1, 2, 3)
    model.gate.set()
    await asyncio.gather(first, *tasks)
    assert metrics.value("faceteer_batch_size_sum", batcher="test") == 4
    assert metrics.value("faceteer_batch_size_count", batcher="test") == 2
    assert metrics.value("faceteer_model_seconds_count", batcher="test") == 2
    assert metrics.value("faceteer_queue_seconds_count", batcher="test") == 4


class Guarded(deque):
    """A batcher's waiting items, which may only be touched by whoever holds its lock."""

    lock: threading.Lock

    def append(self, entry):
        assert self.lock.locked()
        super().append(entry)

    def popleft(self):
        assert self.lock.locked()
        return super().popleft()

    def remove(self, entry):
        assert self.lock.locked()
        super().remove(entry)


class Watched(MicroBatcher):
    """Notes who changes what the lock guards without holding it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("_waiting", "_scheduled") and name in self.__dict__:
            assert self._lock.locked(), name
        if name == "_waiting":
            value = Guarded(value)
        super().__setattr__(name, value)
        if "_waiting" in self.__dict__ and "_lock" in self.__dict__:
            self._waiting.lock = self._lock


async def test_what_two_threads_change_is_only_changed_under_the_lock(model: Model, worker: ModelWorker) -> None:
    squares = Watched(model, max_batch=2, max_queue=3, worker=worker, name="test")
    first = await hold(model, squares)
    a, b, c = await submit(squares, 1, 2, 3)
    with pytest.raises(QueueFull):
        await squares.submit(4)
    b.cancel()
    with pytest.raises(asyncio.CancelledError):
        await b
    model.gate.set()
    assert [result.value for result in await asyncio.gather(first, a, c)] == [0, 1, 9]
    await until(lambda: not squares._scheduled)
    first = await hold(model, squares)
    (left,) = await submit(squares, 5)
    squares.close()
    with pytest.raises(Draining):
        await left
    model.gate.set()
    await first


async def test_a_worker_that_closes_between_two_batches_answers_those_who_wait(model: Model) -> None:
    worker = ModelWorker("test-model")
    squares = Watched(model, max_batch=1, max_queue=8, worker=worker, name="test")
    first = await hold(model, squares)
    rest = await submit(squares, 1, 2)
    closing = asyncio.create_task(asyncio.to_thread(worker.close))
    await until(lambda: worker._closed)
    model.gate.set()
    assert (await first).value == 0
    for task in rest:
        with pytest.raises(Draining):
            await asyncio.wait_for(task, 5)
    await closing
    assert squares.depth == 0
    with pytest.raises(Draining):
        await squares.submit(3)
    assert squares.depth == 0


async def test_the_estimate_counts_the_batches_ahead_and_the_one_that_runs(model: Model, worker: ModelWorker) -> None:
    squares = batcher(model, worker, max_batch=2, max_queue=4)
    squares._batch_s = 10.0
    await hold(model, squares)
    await submit(squares, 1, 2, 3, 4)
    with pytest.raises(QueueFull) as full:
        await squares.submit(5)
    assert full.value.retry_after_s == pytest.approx((4 / 2 + 1) * 10.0)
    squares._batch_s = 0.0
    with pytest.raises(QueueFull) as full:
        await squares.submit(5)
    assert full.value.retry_after_s == 0.05
    model.gate.set()


async def test_the_time_of_a_batch_is_a_running_mean(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    squares = batcher(lambda items: items, worker)
    for began, took in ((0.0, 2.0), (10.0, 4.0)):
        clock = iter([began, began, began + took])
        monkeypatch.setattr("faceteer_runtime.batching.time.perf_counter", lambda clock=clock: next(clock))
        await squares.submit(1)
    monkeypatch.undo()
    assert squares._batch_s == pytest.approx(0.8 * 2.0 + 0.2 * 4.0)


@pytest.mark.parametrize(("max_batch", "max_queue"), [(0, 1), (1, 0)])
def test_a_batch_and_a_queue_hold_at_least_one_item(max_batch: int, max_queue: int, worker: ModelWorker) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        batcher(len, worker, max_batch=max_batch, max_queue=max_queue)
    batcher(len, worker, max_batch=1, max_queue=1)
