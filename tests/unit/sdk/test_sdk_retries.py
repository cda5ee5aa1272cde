"""Retries and deadlines: what is tried again, how long is waited, when it stops."""

from __future__ import annotations

import threading
import time
from typing import Any

import faceteer
import pytest
from faceteer._transport.retries import Attempts, Retries, Timeouts
from hypothesis import given
from hypothesis import strategies as st
from unit.sdk.fake_server import FakeServer, Fault, png

UNAVAILABLE = Fault("UNAVAILABLE", "STARTING")


def test_unavailable_is_tried_again_until_it_works(either: Any, server: FakeServer) -> None:
    server.fail("GetStudio", *[UNAVAILABLE] * 4)
    assert either.status().bundle == "fake"
    assert server.names().count("GetStudio") == 5


def test_the_fifth_failure_is_the_last(either: Any, server: FakeServer) -> None:
    server.fail("GetStudio", *[UNAVAILABLE] * 9)
    with pytest.raises(faceteer.UnavailableError):
        either.status()
    assert server.names().count("GetStudio") == 5


def test_no_retries_means_one_try(server: FakeServer) -> None:
    server.fail("GetStudio", UNAVAILABLE)
    with faceteer.connect(server.address, retries=0) as client, pytest.raises(faceteer.UnavailableError):
        client.status()
    assert server.names() == ["GetStudio"]


def test_a_full_queue_is_tried_again_when_the_server_says_when_and_not_before(either: Any, server: FakeServer) -> None:
    server.fail("OpenImage", Fault("RESOURCE_EXHAUSTED", "QUEUE_FULL", retry_after=0.3))
    started = time.monotonic()
    either.open(png(1))
    assert time.monotonic() - started >= 0.3
    assert server.names().count("OpenImage") == 2


BUSY = Fault("RESOURCE_EXHAUSTED", "QUEUE_FULL", retry_after=0.01)


def test_a_busy_server_that_says_when_to_come_back_is_asked_until_the_deadline(either: Any, server: FakeServer) -> None:
    server.fail("EditImage", *[BUSY] * 7)
    photo = either.open(png(9))
    assert photo.edit().render(seed=1).info["seed"] == 1
    assert server.names().count("EditImage") == 8
    server.fail("OpenImage", *[BUSY] * 500)
    started = time.monotonic()
    with pytest.raises(faceteer.QueueFullError):
        either.open(png(2), timeout=1.0)
    assert 0.2 < time.monotonic() - started < 1.5


def test_being_sent_away_by_a_busy_server_uses_up_no_retries(either: Any, server: FakeServer) -> None:
    server.fail("OpenImage", *[BUSY] * 6, *[UNAVAILABLE] * 4)
    either.open(png(1))
    assert server.names().count("OpenImage") == 11


def test_no_retries_means_one_try_at_a_busy_server_too(server: FakeServer) -> None:
    server.fail("OpenImage", BUSY)
    with faceteer.connect(server.address, retries=0) as client, pytest.raises(faceteer.QueueFullError):
        client.open(png(1))


def test_a_full_queue_without_a_time_is_final(either: Any, server: FakeServer) -> None:
    server.fail("OpenImage", Fault("RESOURCE_EXHAUSTED", "QUEUE_FULL"))
    with pytest.raises(faceteer.QueueFullError) as raised:
        either.open(png(1))
    assert raised.value.retry_after is None
    assert server.names().count("OpenImage") == 1


def test_retrying_ends_where_the_deadline_would_pass_and_the_failure_is_what_is_raised(
    either: Any, server: FakeServer
) -> None:
    server.fail("OpenImage", Fault("RESOURCE_EXHAUSTED", "QUEUE_FULL", retry_after=30))
    started = time.monotonic()
    with pytest.raises(faceteer.QueueFullError) as raised:
        either.open(png(1), timeout=2)
    assert time.monotonic() - started < 1, "waiting 30 s within 2 s is not begun"
    assert raised.value.retry_after == pytest.approx(30)


def test_the_deadline_is_the_whole_operations_and_not_each_trys(server: FakeServer) -> None:
    server.answer_seconds = 0.15
    server.fail("GetStudio", *[UNAVAILABLE] * 20)
    started = time.monotonic()
    with (
        faceteer.connect(server.address, retries=faceteer.Retries(attempts=50, first=0.01)) as client,
        pytest.raises((faceteer.UnavailableError, faceteer.DeadlineExceededError)),
    ):
        client.status(timeout=0.5)
    assert time.monotonic() - started < 1.0


def test_a_server_that_comes_up_during_the_retries_is_found() -> None:
    with FakeServer() as placeholder:
        port = placeholder.port
    retries = faceteer.Retries(attempts=60, first=0.1, factor=1)
    with faceteer.connect(f"127.0.0.1:{port}", retries=retries) as client:
        with pytest.raises(faceteer.ServerUnreachableError, match="no Faceteer server answers"):
            client.status(timeout=0.4)
        later = FakeServer(port=port)
        starting = threading.Timer(0.5, later.__enter__)
        starting.start()
        try:
            assert client.status(timeout=10).bundle == "fake"
        finally:
            starting.join()
            later.__exit__()


def test_a_server_that_restarts_is_found_again(either: Any, server: FakeServer) -> None:
    assert either.status().bundle == "fake"
    server.__exit__()
    with FakeServer(port=server.port):
        assert either.status().bundle == "fake"


@given(retry=st.integers(0, 12), asked=st.none() | st.floats(0, 60), luck=st.floats(0, 1, exclude_max=True))
def test_the_wait_grows_stays_within_its_bounds_and_is_never_less_than_the_server_asked(
    retry: int, asked: float | None, luck: float
) -> None:
    retries = Retries(attempts=99, first=0.1, factor=2, longest=5, _random=lambda: luck)
    wait = retries.wait(retry, faceteer.UnavailableError("x", retry_after=asked))
    assert wait is not None
    backoff = min(5, 0.1 * 2**retry)
    assert wait >= backoff / 2
    assert wait >= (asked or 0)
    assert wait <= max(backoff, (asked or 0) * 1.25)


def test_what_arrives_between_two_failures_starts_the_count_anew() -> None:
    attempts, down = (
        Attempts(Retries(attempts=3, first=1.0, _random=lambda: 0.0), None),
        faceteer.UnavailableError("down"),
    )
    assert [attempts.pause(down), attempts.pause(down)] == [0.5, 1.0]
    attempts.progress()
    assert [attempts.pause(down), attempts.pause(down)] == [0.5, 1.0], "shorter waits again, and as many"
    with pytest.raises(faceteer.UnavailableError, match="down"):
        attempts.pause(down)


def test_progress_also_forgets_that_the_server_was_unreachable() -> None:
    attempts, late = Attempts(Retries(), 60), faceteer.DeadlineExceededError("late")
    attempts.pause(faceteer.ServerUnreachableError("nothing there"))
    with pytest.raises(faceteer.ServerUnreachableError):
        attempts.pause(late)
    attempts.progress()
    with pytest.raises(faceteer.DeadlineExceededError):
        attempts.pause(late)


def test_one_number_is_every_kinds_deadline() -> None:
    assert Timeouts.of(3) == Timeouts(3, 3, 3, 3)
    assert Timeouts.of(None) == Timeouts()


@pytest.mark.parametrize("wrong", [0, -1, float("nan")])
def test_a_timeout_that_is_none_is_refused(wrong: float) -> None:
    with pytest.raises(faceteer.InvalidArgumentError, match="timeout"):
        faceteer.connect("a:1", timeout=wrong)
    with faceteer.connect("a:1") as client, pytest.raises(faceteer.InvalidArgumentError, match="timeout"):
        client.status(timeout=wrong)


def test_negative_retries_are_refused() -> None:
    with pytest.raises(faceteer.InvalidArgumentError, match="retries"):
        faceteer.connect("a:1", retries=-1)


KINDS = {
    "GetStudio": ("query", lambda client: client.status()),
    "GetFeature": ("query", lambda client: client.features[3]),
    "ListFeatures": ("query", lambda client: list(client.features.list(limit=1))),
    "SearchFeatures": ("query", lambda client: client.features.search("n")),
    "ListFeatureExamples": ("query", lambda client: client.features[3].examples()),
    "OpenImage": ("open", lambda client: client.open(png(9))),
    "EncodeTexts": ("open", lambda client: client.encode_texts(["night"])),
    "EncodeFeatures": ("open", lambda client: client.encode_features(client.open(png(9)))),
    "DecodeFeatures": ("open", lambda client: client.decode_features({3: 1.0})),
    "DiffFeatures": ("open", lambda client: client.diff(client.open(png(9)), client.open(png(0, 9)))),
    "TransferFeatures": ("open", lambda client: client.transfer(client.open(png(9)), client.open(png(0, 9)))),
    "EditImage": ("render", lambda client: client.open(png(9)).edit().render(seed=1)),
    "EmbedPrompt": ("render", lambda client: client.embed_prompt("night")),
    "GetFeatureIcon": ("render", lambda client: client.features["night"].icon()),
    "StreamEncodeImages": ("bulk", lambda client: client.encode([png(9)])),
}


@pytest.mark.parametrize("call", KINDS)
def test_each_call_has_the_deadline_of_its_kind(server: FakeServer, call: str) -> None:
    kind, run = KINDS[call]
    timeouts = Timeouts(query=100, open=200, render=300, bulk=400)
    with faceteer.connect(server.address, timeout=timeouts) as client:
        run(client)
    assert server.deadlines[call] == pytest.approx(getattr(timeouts, kind), abs=10)


def test_a_report_has_the_deadline_of_opening_and_a_callers_own_wins(
    client: faceteer.Client, server: FakeServer
) -> None:
    edit = client.open(png(9)).edit()
    with faceteer.connect(server.address, timeout=Timeouts(open=200, render=300)) as patient:
        patient.open(png(9)).edit().report()
        assert server.deadlines["EditImage"] == pytest.approx(200, abs=10)
    edit.report(timeout=50)
    assert server.deadlines["EditImage"] == pytest.approx(50, abs=5)


def test_the_documented_defaults_hold() -> None:
    assert Timeouts() == Timeouts(query=15, open=60, render=600, bulk=120)
    assert Retries() == Retries(attempts=5, first=0.1, factor=2.0, longest=5.0)
    assert Retries.of(0).attempts == 1
    assert Retries.of(3).attempts == 4


def test_pictures_that_arrive_between_failures_give_a_drawing_its_retries_back(server: FakeServer, either: Any) -> None:
    # Edited, queued, started, one step, one picture: each try draws one more, and there are more tries than retries.
    server.fail("EditImage", *[Fault("UNAVAILABLE", after=5)] * 6)
    pictures = either.open(png(9)).edit().render(seeds=range(7), steps=1)
    assert [picture.info["seed"] for picture in pictures] == list(range(7))
    server.fail("EditImage", *[Fault("UNAVAILABLE", after=4)] * 9)
    with pytest.raises(faceteer.UnavailableError):
        either.open(png(9)).edit().render(seed=1, steps=1)
