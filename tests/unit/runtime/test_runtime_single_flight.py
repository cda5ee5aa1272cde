"""Identical concurrent work runs once."""

from __future__ import annotations

import asyncio
import gc

import pytest
from faceteer_runtime.single_flight import SingleFlight


class Work:
    """Counts its runs and waits until it is let go."""

    def __init__(self) -> None:
        self.runs = 0
        self.cancelled = 0
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self) -> int:
        self.runs += 1
        run = self.runs
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return run


async def callers(flights: SingleFlight, work: Work, n: int, key: str = "k") -> list[asyncio.Task]:
    tasks = [asyncio.ensure_future(flights.run(key, work)) for _ in range(n)]
    await asyncio.sleep(0.01)
    return tasks


async def test_all_callers_share_one_run() -> None:
    flights, work = SingleFlight(), Work()
    tasks = await callers(flights, work, 5)
    work.go.set()
    assert await asyncio.gather(*tasks) == [1] * 5
    assert len(flights) == 0


async def test_a_cancelled_leader_does_not_take_its_followers_with_it() -> None:
    flights, work = SingleFlight(), Work()
    leader, *followers = await callers(flights, work, 3)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    work.go.set()
    assert await asyncio.gather(*followers) == [1, 1]
    assert work.cancelled == 0


async def test_work_that_nobody_waits_for_any_more_is_cancelled_and_forgotten() -> None:
    flights, work = SingleFlight(), Work()
    tasks = await callers(flights, work, 2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0)
    assert work.cancelled == 1
    assert len(flights) == 0
    work.go.set()
    assert await flights.run("k", work) == 2


async def test_a_newcomer_during_the_cancelling_starts_afresh() -> None:
    flights, work = SingleFlight(), Work()
    (first,) = await callers(flights, work, 1)
    first.cancel()
    second = asyncio.ensure_future(flights.run("k", work))
    await asyncio.sleep(0.01)
    work.go.set()
    assert await second == 2


async def test_a_failure_reaches_everybody_and_the_next_call_tries_again() -> None:
    flights, work = SingleFlight(), Work()
    work.error = ValueError("broken")
    tasks = await callers(flights, work, 3)
    work.go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(result) for result in results] == ["broken"] * 3
    work.error = None
    assert await flights.run("k", work) == 2


async def test_different_keys_do_not_wait_for_each_other() -> None:
    flights, slow, quick = SingleFlight(), Work(), Work()
    (waiting,) = await callers(flights, slow, 1, "slow")
    quick.go.set()
    assert await flights.run("quick", quick) == 1
    slow.go.set()
    await waiting


async def test_a_failure_that_nobody_hears_makes_no_noise() -> None:
    flights, work = SingleFlight(), Work()

    async def stubborn() -> int:
        try:
            await work.go.wait()
        except asyncio.CancelledError:
            raise ValueError("while cleaning up") from None
        return 1

    complaints: list[dict] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    task = asyncio.ensure_future(flights.run("k", stubborn))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0.01)
    gc.collect()
    assert complaints == []
