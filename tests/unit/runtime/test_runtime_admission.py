"""Which calls are taken, and when the last one has ended."""

from __future__ import annotations

import asyncio

import pytest
from faceteer_runtime.admission import Admission
from faceteer_runtime.errors import Draining, QueueFull, Starting


def test_calls_are_taken_between_the_start_and_the_draining() -> None:
    admission = Admission()
    with pytest.raises(Starting):
        admission.enter()
    admission.open()
    admission.enter()
    admission.drain()
    with pytest.raises(Draining):
        admission.enter()
    assert admission.in_flight == 1


def test_a_server_that_drains_is_not_opened_again() -> None:
    admission = Admission()
    admission.drain()
    admission.open()
    assert admission.phase == "draining"
    with pytest.raises(Draining):
        admission.enter()


def test_each_admitted_call_counts_until_it_leaves_and_a_refused_one_never() -> None:
    admission = Admission(max_calls=2)
    admission.open()
    admission.enter()
    admission.enter()
    for _ in range(3):
        with pytest.raises(QueueFull) as full:
            admission.enter()
    assert full.value.retry_after_s == 0.5
    assert admission.in_flight == 2
    admission.leave()
    assert admission.in_flight == 1
    admission.enter()
    with pytest.raises(QueueFull):
        admission.enter()


def test_a_thousand_calls_are_taken_by_default() -> None:
    admission = Admission()
    admission.open()
    for _ in range(1000):
        admission.enter()
    with pytest.raises(QueueFull):
        admission.enter()


async def test_it_is_idle_when_the_last_call_has_left_and_not_before() -> None:
    admission = Admission()
    admission.open()
    assert await admission.wait_idle(0.0)
    admission.enter()
    admission.enter()
    admission.leave()
    assert not await admission.wait_idle(0.01)
    waiting = asyncio.create_task(admission.wait_idle(10))
    await asyncio.sleep(0)
    admission.leave()
    assert await asyncio.wait_for(waiting, 1)
    # And again: a second burst is waited for like the first.
    admission.enter()
    assert not await admission.wait_idle(0.01)
    admission.leave()
    assert await admission.wait_idle(0.01)
