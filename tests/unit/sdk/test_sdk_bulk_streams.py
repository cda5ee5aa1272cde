"""What bulk encoding does with its streams, one scripted answer at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import faceteer
import numpy as np
import pytest
from faceteer._sync import bulk as module
from faceteer._sync.bulk import Bulk
from faceteer._transport.retries import Attempts, Retries, Timeouts
from faceteer._views.progress import Bar
from faceteer.v1 import encoder_pb2
from unit.sdk.fake_world import embeds_of, png

PICTURES = [png(n) for n in range(1, 13)]


class Script:
    """A connection whose streams answer the oldest picture, unless the script says otherwise.

    Attributes:
        under_way: pictures written and not answered, at each time that an answer was waited for.
        timeouts_given: of each stream, in seconds.
        before: called with (stream, receive) numbers before each answer; may raise, or pass time.
    """

    address = "fake:1"
    retries = Retries(attempts=3, first=0.0)

    def __init__(self, bulk_timeout: float | None = 100.0) -> None:
        self.timeouts = Timeouts(bulk=bulk_timeout)
        self.transport = self
        self.streams = 0
        self.under_way: list[list[int]] = []
        self.timeouts_given: list[float | None] = []
        self.before: Callable[[int, int], None] = lambda stream, receive: None

    def attempts(self, timeout: float | None, default: float | None) -> Attempts:
        return Attempts(self.retries, default if timeout is None else timeout)

    def stream(self, method: Any, request: None, timeout: float | None) -> Self:
        self.streams += 1
        self.timeouts_given.append(timeout)
        self.under_way.append([])
        self._written: list[Any] = []
        self._done = False
        return self

    def write(self, request: Any) -> None:
        assert not self._done, "nothing is written after the last"
        self._written.append(request)

    def done_writing(self) -> None:
        assert not self._done, "the end is said once"
        self._done = True

    def receive(self) -> encoder_pb2.StreamEncodeImagesResponse | None:
        self.under_way[-1].append(len(self._written))
        self.before(self.streams, len(self.under_way[-1]))
        if not self._written:
            assert self._done, "waiting for what was never asked"
            return None
        request = self._written.pop(0)
        answer = encoder_pb2.StreamEncodeImagesResponse(sequence=request.sequence)
        tensor = answer.result.embedding.embeds
        values = embeds_of(request.image)
        tensor.element_type, tensor.data = 1, values.tobytes()
        tensor.shape.append(len(values))
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which passes only when a test adds to it."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def encode(script: Script, pictures: Any = PICTURES, *, batch_size: int = 2, timeout: float | None = None) -> Any:
    bar = Bar(False, "encoding")
    connection: Any = script
    bulk = Bulk(connection, pictures, batch_size=batch_size, bar=bar, total=None, on_error="raise", timeout=timeout)
    return bulk.encode()


def test_twice_the_batch_is_under_way_and_each_answer_lets_one_more_go() -> None:
    script = Script()
    np.testing.assert_array_equal(encode(script), [embeds_of(picture) for picture in PICTURES])
    assert script.under_way == [[4] * 9 + [3, 2, 1, 0]]
    assert script.timeouts_given == [100.0]


def test_the_stream_after_a_broken_one_starts_with_two_pictures_until_one_is_answered() -> None:
    script = Script()

    def before(stream: int, receive: int) -> None:
        if stream == 1 and receive == 3:
            raise faceteer.UnavailableError("down")

    script.before = before
    assert len(encode(script)) == 12
    assert script.under_way[0] == [4, 4, 4]
    assert script.under_way[1][:3] == [2, 4, 4], "slowly, then as before"


def test_a_stream_is_renewed_after_half_its_deadline(clock: list[float]) -> None:
    script = Script(bulk_timeout=100.0)

    def before(stream: int, receive: int) -> None:
        clock[0] += 10.0

    script.before = before
    assert len(encode(script)) == 12
    # 10 s an answer: older than 50 s after six, when four are under way still.
    assert script.under_way == [[4, 4, 4, 4, 4, 4, 3, 2, 1, 0], [3, 2, 1, 0]]


def test_a_stream_without_a_deadline_is_never_old(clock: list[float]) -> None:
    script = Script(bulk_timeout=None)

    def before(stream: int, receive: int) -> None:
        clock[0] += 1000.0

    script.before = before
    assert len(encode(script)) == 12
    assert script.timeouts_given == [None]


def test_a_stream_has_what_is_left_of_the_callers_deadline(clock: list[float]) -> None:
    script = Script(bulk_timeout=30.0)

    def before(stream: int, receive: int) -> None:
        clock[0] += 4.0

    script.before = before
    assert len(encode(script, timeout=60.0)) == 12
    assert script.timeouts_given == [30.0, 28.0], "eight answers of 4 s each on the first"
    hurried = Script(bulk_timeout=30.0)
    encode(hurried, timeout=5.0)
    assert hurried.timeouts_given == [5.0]


def test_a_deadline_that_a_slow_source_used_up_is_no_failure_and_one_that_the_server_used_up_is(
    clock: list[float],
) -> None:
    late = faceteer.DeadlineExceededError("late")
    script = Script(bulk_timeout=100.0)

    def slow_source(stream: int, receive: int) -> None:
        if stream < 9 and receive == 2:
            clock[0] += 24.0
            raise late

    script.before = slow_source
    assert len(encode(script)) == 12, "eight deadlines, more than there are retries"
    script = Script(bulk_timeout=100.0)

    def slow_server(stream: int, receive: int) -> None:
        clock[0] += 25.0
        raise late

    script.before = slow_server
    with pytest.raises(faceteer.DeadlineExceededError):
        encode(script)
    assert script.streams == 1


def test_a_source_that_is_slower_than_the_callers_own_deadline_is_late(clock: list[float]) -> None:
    script = Script(bulk_timeout=100.0)

    def before(stream: int, receive: int) -> None:
        clock[0] += 10.0
        raise faceteer.DeadlineExceededError("late")

    script.before = before
    with pytest.raises(faceteer.DeadlineExceededError):
        encode(script, timeout=10.0)


def test_the_pictures_of_a_stream_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PICTURES_A_STREAM", 5)
    script = Script()
    assert len(encode(script, batch_size=1)) == 12
    assert [sum(1 for _ in waits) - 1 for waits in script.under_way] == [5, 5, 2]


def test_only_the_wait_since_the_last_answer_counts_against_the_server(clock: list[float]) -> None:
    script = Script(bulk_timeout=100.0)
    script.retries = Retries(attempts=1)

    def before(stream: int, receive: int) -> None:
        clock[0] += 10.0
        if stream == 1 and receive == 4:
            raise faceteer.DeadlineExceededError("late")

    script.before = before
    assert len(encode(script)) == 12, "30 s were waited in all, but 10 s since the third picture"
