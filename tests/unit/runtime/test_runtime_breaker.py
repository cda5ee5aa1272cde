"""The circuit breaker, on a clock of its own."""

from __future__ import annotations

from faceteer_runtime.breaker import Breaker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def broken(clock: Clock, **options) -> Breaker:
    breaker = Breaker(threshold=3, pause_s=1.0, max_pause_s=5.0, clock=clock, **options)
    for _ in range(3):
        assert breaker.allow()
        breaker.failure()
    return breaker


def test_it_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(threshold=3)
    for outcome in (breaker.failure, breaker.failure, breaker.success, breaker.failure, breaker.failure):
        outcome()
    assert breaker.state == "closed"
    breaker.failure()
    assert breaker.state == "open"
    assert not breaker.allow()


def test_after_the_pause_one_probe_goes_through() -> None:
    clock = Clock()
    breaker = broken(clock)
    clock.now = 0.99
    assert not breaker.allow()
    clock.now = 1.0
    assert breaker.allow()
    assert breaker.state == "half_open"
    assert not breaker.allow()
    breaker.success()
    assert breaker.state == "closed"
    assert breaker.allow()


def test_failed_probes_double_the_pause_up_to_a_limit() -> None:
    clock = Clock()
    breaker = broken(clock)
    pauses = []
    for _ in range(5):
        began = clock.now
        while not breaker.allow():
            clock.now += 0.25
        pauses.append(clock.now - began)
        breaker.failure()
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_late_failures_of_calls_begun_before_it_opened_do_not_lengthen_the_pause() -> None:
    clock = Clock()
    breaker = broken(clock)
    clock.now = 0.9
    breaker.failure()
    clock.now = 1.0
    assert breaker.allow()


def test_a_probe_that_was_not_tried_leaves_the_next_caller_to_probe() -> None:
    clock = Clock()
    breaker = broken(clock)
    clock.now = 1.0
    assert breaker.allow()
    breaker.release()
    assert breaker.allow()
    breaker.success()
    breaker.release()
    assert breaker.state == "closed"


def test_changes_are_told() -> None:
    states: list[str] = []
    clock = Clock()
    breaker = broken(clock, on_change=states.append)
    clock.now = 1.0
    breaker.allow()
    breaker.success()
    assert states == ["open", "half_open", "closed"]


def test_a_second_outage_is_met_like_the_first() -> None:
    clock = Clock()
    breaker = broken(clock)
    for pause in (1.0, 2.0):
        clock.now += pause
        assert breaker.allow()
        breaker.failure()
    clock.now += 4.0
    assert breaker.allow()
    breaker.success()
    for _ in range(2):
        breaker.failure()
        assert breaker.state == "closed"
    breaker.failure()
    assert breaker.state == "open"
    clock.now += 0.99
    assert not breaker.allow()
    clock.now += 0.01
    assert breaker.allow()


def test_it_goes_by_its_defaults_and_tells_of_no_change_where_there_is_none() -> None:
    clock, states = Clock(), list[str]()
    breaker = Breaker(clock=clock, on_change=states.append)
    breaker.success()
    assert states == []
    for _ in range(3):
        breaker.failure()
    assert states == ["open"]
    pauses = []
    for _ in range(6):
        began = clock.now
        while not breaker.allow():
            clock.now += 0.125
        pauses.append(clock.now - began)
        breaker.failure()
    assert pauses == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
