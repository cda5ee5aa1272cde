"""Results by content: cached, or computed once for all who wait; and what a call of several items cost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

import numpy as np
import pytest
from faceteer_runtime.cache import Cache
from faceteer_runtime.errors import Draining, InvalidField, QueueFull
from faceteer_runtime.execution import Cost, execution
from faceteer_runtime.memo import Memo
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.outcome import Computed, Failed, attempt, required
from faceteer_runtime.record import Record


def memo(cache: Cache | None = None) -> Memo[float]:
    def from_record(record: Record) -> float | None:
        value = record.get("value")
        return float(value[0]) if isinstance(value, np.ndarray) else None

    return Memo(cache or Cache(1 << 20, Metrics()), lambda value: {"value": np.array([value])}, from_record)


def work(value: float, ran: list[float] | None = None) -> Callable[[], Awaitable[Computed[float]]]:
    async def compute() -> Computed[float]:
        await asyncio.sleep(0)
        if ran is not None:
            ran.append(value)
        if value < 0:
            raise InvalidField("x", "is negative")
        return Computed(value, 3, 5)

    return compute


async def test_what_was_computed_once_is_found_afterwards() -> None:
    one = memo()
    assert await one.find("a:b:c:d") is None
    assert await one.compute("a:b:c:d", work(2.0)) == Computed(2.0, 3, 5, False)
    assert await one.find("a:b:c:d") == 2.0


async def test_a_record_of_another_form_is_a_miss_and_is_computed_anew() -> None:
    cache = Cache(1 << 20, Metrics())
    cache.put("k", {"other": b"version"})
    one = memo(cache)
    assert await one.find("k") is None
    (found,), _ = await one.of_many(["k"], lambda at: work(1.0)())
    assert found == Computed(1.0, 3, 5, False)


async def test_identical_items_run_once_and_known_ones_do_not_run() -> None:
    one, ran = memo(), list[float]()
    await one.compute("known", work(7.0))
    keys, values = ["a", "known", "b", "a"], [1.0, 7.0, 2.0, 1.0]
    found, cache_us = await one.of_many(keys, lambda at: work(values[at], ran)())
    assert [required(outcome).value for outcome in found] == values
    assert [required(outcome).cached for outcome in found] == [False, True, False, False]
    assert ran == [1.0, 2.0]
    assert cache_us >= 0


async def test_an_item_that_fails_fails_alone_and_is_not_kept() -> None:
    one, values = memo(), [1.0, -1.0, 2.0]
    found, _ = await one.of_many(["a", "b", "c"], lambda at: work(values[at])())
    assert [isinstance(outcome, Failed) for outcome in found] == [False, True, False]
    with pytest.raises(InvalidField):
        required(found[1])
    assert await one.find("b") is None


@pytest.mark.parametrize("error", [QueueFull(0.5), Draining()])
async def test_a_full_or_stopping_server_fails_the_call_and_stops_its_other_items(error: Exception) -> None:
    one, stopped = memo(), list[str]()

    async def refuse(at: int) -> Computed[float]:
        if at == 1:
            raise error
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.append("a")
            raise
        return Computed(0.0)

    with pytest.raises(type(error)) as raised:
        await asyncio.wait_for(one.of_many(["a", "b"], refuse), 5)
    assert raised.value is error
    await asyncio.sleep(0)
    assert stopped == ["a"]


async def test_room_is_held_for_the_unknown_items_only_and_until_they_are_done() -> None:
    one, held = memo(), list[tuple[str, int]]()
    await one.compute("known", work(7.0))

    @contextlib.contextmanager
    def admitted(items: int) -> Iterator[None]:
        held.append(("enter", items))
        yield
        held.append(("leave", items))

    async def compute(at: int) -> Computed[float]:
        held.append(("work", at))
        return Computed(float(at))

    await one.of_many(["known", "a", "b"], compute, admitted)
    assert held == [("enter", 2), ("work", 1), ("work", 2), ("leave", 2)]


def test_a_call_costs_what_its_slowest_item_costs() -> None:
    items = [Computed(1, 5, 20), Computed(2, 10, 7), Computed(3, cached=True)]
    assert Cost.of(items, 9) == Cost(cached=False, queue_us=10, compute_us=20, cache_us=9)
    assert Cost.of([Computed(1, cached=True)], 0).cached
    assert Cost.of([], 4) == Cost(True, 0, 0, 4)
    assert not Cost.of([Computed(1, cached=True), Failed(ValueError())], 0).cached
    said = execution("rev", *Cost(False, 10, 20, 9))
    assert (said.model_revision, said.cached) == ("rev", False)
    assert (said.queue_us, said.compute_us, said.cache_us) == (10, 20, 9)


def test_only_errors_for_the_caller_become_an_items_outcome() -> None:
    def refuse() -> None:
        raise InvalidField("x", "is wrong")

    assert isinstance(attempt(refuse), Failed)
    assert attempt(int, "3") == 3
    with pytest.raises(ValueError, match="invalid literal"):
        attempt(int, "x")
