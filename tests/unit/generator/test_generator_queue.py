"""Who is next, who shares, who is refused: the queue by itself, without asyncio or a model."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from faceteer_generator.queue import Job, Queue, Request, charge
from faceteer_runtime.errors import QueueFull
from faceteer_runtime.metrics import Metrics


class Asked(Request):
    def __init__(self) -> None:
        super().__init__()
        self.delivered: list[tuple[int, Any]] = []
        self.error: BaseException | None = None

    def deliver(self, index: int, result: Any) -> None:
        self.delivered.append((index, result))

    def fail(self, error: BaseException) -> None:
        self.error = error


class Other(Job):
    lane: ClassVar[str] = "others"


class Task:
    def __init__(self, calls_left: int) -> None:
        self.calls_left = calls_left

    @property
    def done(self) -> bool:
        return self.calls_left == 0


def joined(queue: Queue, *keys: str, cls: type[Job] = Job, calls: int = 5) -> Asked:
    request = Asked()
    queue.join(request, [(index, cls(key, calls)) for index, key in enumerate(keys)])
    return request


def turn(queue: Queue) -> list[str]:
    return [job.key for job in queue.next_turn()]


def test_every_requests_first_job_goes_before_anyones_second() -> None:
    queue = Queue(5, 20)
    joined(queue, "a1", "a2", "a3")
    joined(queue, "b1")
    joined(queue, "c1", "c2", "c3", "c4")
    assert turn(queue) == ["a1", "b1", "c1", "a2", "c2"]
    assert turn(Queue(5, 20)) == []


def test_a_job_whose_calls_are_made_leaves_its_place_to_the_next_before_it_is_delivered() -> None:
    queue = Queue(2, 20)
    joined(queue, "a1", "a2", "a3")
    joined(queue, "b1")
    queue.next_turn()[0].task = Task(0)
    assert turn(queue) == ["a2", "b1"]
    assert len(queue) == 4


def test_a_new_request_joins_the_very_next_turn() -> None:
    queue = Queue(2, 20)
    joined(queue, "a1", "a2", "a3", "a4")
    assert turn(queue) == ["a1", "a2"]
    joined(queue, "b1")
    assert turn(queue) == ["a1", "b1"]


def test_each_lane_has_its_own_places_in_a_turn() -> None:
    queue = Queue(2, 20)
    for key in ("x1", "x2", "x3"):
        joined(queue, key, cls=Other)
    joined(queue, "a1", "a2", "a3")
    assert turn(queue) == ["x1", "x2", "a1", "a2"]


def test_equal_jobs_are_one_job_that_takes_one_place_and_goes_to_all() -> None:
    queue = Queue(2, 1)
    first, second, twice = joined(queue, "a", "b"), joined(queue, "b"), joined(queue, "a", "a")
    assert len(queue) == 2
    assert turn(queue) == ["a", "b"]
    a, b = queue.next_turn()
    queue.finish(a, "A")
    assert first.delivered == [(0, "A")]
    assert twice.delivered == [(0, "A"), (1, "A")]
    assert queue.requests == [first, second]
    queue.finish(b, "B")
    assert (first.delivered[-1], second.delivered) == ((1, "B"), [(0, "B")])
    assert (queue.requests, len(queue)) == ([], 0)


def test_who_leaves_takes_only_what_nobody_else_waits_for() -> None:
    queue = Queue(4, 4)
    leaving, staying = joined(queue, "a", "b"), joined(queue, "b")
    a, b = queue.next_turn()
    queue.leave(leaving)
    queue.leave(leaving)
    assert turn(queue) == ["b"]
    assert not a.watchers
    queue.finish(b, "B")
    assert (leaving.delivered, staying.delivered) == ([], [(0, "B")])
    assert len(queue) == 0


def test_a_job_that_all_have_left_and_a_new_one_of_its_key_do_not_mix() -> None:
    queue = Queue(4, 4)
    gone = joined(queue, "a")
    (old,) = queue.next_turn()
    queue.leave(gone)
    new = joined(queue, "a")
    assert queue.next_turn()[0] is not old
    queue.finish(old, "old")
    assert (len(queue), turn(queue), new.delivered) == (1, ["a"], [])


def test_a_failed_job_fails_all_that_wait_for_it_with_their_other_jobs_and_nobody_else() -> None:
    queue = Queue(4, 4)
    first, second, other = joined(queue, "a", "b"), joined(queue, "c", "b"), joined(queue, "d")
    b = next(job for job in queue.next_turn() if job.key == "b")
    error = ValueError()
    queue.fail(b, error)
    assert (first.error, second.error, other.error) == (error, error, None)
    assert turn(queue) == ["d"]
    assert len(queue) == 1


def test_places_are_max_batch_and_max_queue_and_a_refusal_changes_nothing() -> None:
    metrics = Metrics()
    queue = Queue(2, 3, metrics)
    assert queue.capacity == 5
    whole = joined(queue, "a", "b", "c", "d")
    assert metrics.value("faceteer_queue_depth", batcher="generator") == 2
    for keys in (("e", "f"), ("a", "e", "f")):
        with pytest.raises(QueueFull):
            joined(queue, *keys)
    assert metrics.value("faceteer_queue_refused_total", batcher="generator") == 2
    assert len(queue) == 4
    # What is under way for others takes no place, and the last place can be taken.
    joined(queue, "a", "b", "e")
    assert len(queue) == 5
    joined(queue, "a")
    queue.leave(whole)
    assert len(queue) == 3
    assert metrics.value("faceteer_queue_depth", batcher="generator") == 1


def test_the_estimate_for_a_retry_is_a_mean_jobs_remaining_calls_at_the_pace_of_turns() -> None:
    queue = Queue(1, 1)
    joined(queue, "a", calls=30)
    joined(queue, "b", calls=10)
    queue.next_turn()[0].task = Task(20)

    def estimate() -> float:
        with pytest.raises(QueueFull) as caught:
            joined(queue, "c")
        assert caught.value.retry_after_s is not None
        return caught.value.retry_after_s

    assert estimate() == 0.05
    queue.turn_took(0.1)
    assert estimate() == pytest.approx((20 + 10) / 2 * 0.1)
    queue.turn_took(0.2)
    assert estimate() == pytest.approx((20 + 10) / 2 * (0.8 * 0.1 + 0.2 * 0.2))


def test_a_request_starts_once_when_the_model_takes_its_first_job_even_a_shared_one() -> None:
    metrics = Metrics()
    queue = Queue(4, 4, metrics)
    first = joined(queue, "a", "b")
    assert first.waited_s == 0
    queue.start(queue.next_turn())
    waited = first.waited_s
    assert waited > 0
    late = joined(queue, "b")
    queue.start(queue.next_turn())
    assert late.waited_s > 0
    assert first.waited_s == waited
    assert metrics.value("faceteer_queue_seconds_count", batcher="generator") == 2


def test_who_joins_after_the_last_call_is_started_by_the_delivery() -> None:
    queue = Queue(4, 4)
    joined(queue, "a")
    (job,) = queue.next_turn()
    job.task = Task(0)
    late = joined(queue, "a")
    assert turn(queue) == []
    queue.finish(job, "A")
    assert late.waited_s > 0
    assert late.delivered == [(0, "A")]


def test_the_models_time_is_charged_to_each_request_once() -> None:
    queue = Queue(4, 4)
    first, second, other = joined(queue, "a", "b"), joined(queue, "b"), joined(queue, "c")
    charge([job for job in queue.next_turn() if job.key != "c"], 0.5)
    charge([job for job in queue.next_turn() if job.key == "b"], 0.25)
    assert (first.compute_s, second.compute_s, other.compute_s) == (0.75, 0.75, 0.0)
