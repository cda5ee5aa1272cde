"""Bulk encoding: order, bounds, bad pictures, broken streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import faceteer
import numpy as np
import pytest
from unit.sdk.fake_server import FakeServer, Fault, embeds_of, png

PICTURES = [png(n + 1, 2 * n) for n in range(25)]


def expected(pictures: list[bytes]) -> np.ndarray:
    return np.stack([embeds_of(picture) for picture in pictures])


@pytest.mark.parametrize("n", [1, 2, 3, 25])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_embeddings_come_in_the_pictures_order_though_answers_do_not(either: Any, n: int, batch_size: int) -> None:
    embeds = either.encode(iter(PICTURES[:n]), batch_size=batch_size)
    assert embeds.dtype == np.float32
    np.testing.assert_array_equal(embeds, expected(PICTURES[:n]))


def test_no_pictures_are_an_array_of_no_rows(either: Any) -> None:
    assert either.encode([]).shape == (0, 512)


def test_no_more_pictures_are_read_than_are_under_way(either: Any) -> None:
    read = 0
    answered = 0
    ahead = []

    def source() -> Iterator[bytes]:
        nonlocal read
        for picture in PICTURES:
            read += 1
            ahead.append(read - answered)
            yield picture

    def note(done: int, total: int | None) -> None:
        nonlocal answered
        answered = done

    either.encode(source(), batch_size=3, progress=note)
    assert max(ahead) <= 6
    assert answered == 25


async def test_the_asyncio_client_takes_async_iterables(async_client: faceteer.AsyncClient) -> None:
    async def source() -> AsyncIterator[bytes]:
        for picture in PICTURES:
            await asyncio.sleep(0)
            yield picture

    np.testing.assert_array_equal(await async_client.encode(source()), expected(PICTURES))


def test_progress_counts_to_the_total_where_it_is_known(either: Any) -> None:
    seen: list[tuple[int, int | None]] = []
    either.encode(PICTURES[:4], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 4) for n in range(1, 5)]
    seen.clear()
    either.encode(iter(PICTURES[:2]), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, None), (2, None)]


BAD = [*PICTURES[:3], b"no picture", *PICTURES[3:6], "nowhere.png", PICTURES[6]]


def test_a_bad_picture_raises_with_its_index(either: Any) -> None:
    with pytest.raises(faceteer.UnreadableImageError, match="item 3: not a picture") as raised:
        either.encode(BAD[:7])
    assert raised.value.index == 3


def test_a_missing_file_raises_with_its_index_and_name(either: Any) -> None:
    with pytest.raises(faceteer.UnreadableImageError, match=r"item 1: nowhere\.png: No such file") as raised:
        either.encode([PICTURES[0], Path("nowhere.png")])
    assert raised.value.index == 1
    assert isinstance(raised.value.__cause__, FileNotFoundError)


def test_bad_pictures_can_be_skipped(either: Any) -> None:
    np.testing.assert_array_equal(either.encode(BAD, on_error="skip"), expected(PICTURES[:7]))


def test_bad_pictures_can_keep_their_rows_as_nan(either: Any) -> None:
    embeds = either.encode(BAD, on_error="nan")
    assert embeds.shape == (9, 512)
    assert np.flatnonzero(np.isnan(embeds).all(1)).tolist() == [3, 7]
    np.testing.assert_array_equal(embeds[8], embeds_of(PICTURES[6]))
    assert np.isnan(either.encode([b"x"], on_error="nan")).all()


def test_bad_pictures_can_be_handed_to_a_function(either: Any) -> None:
    bad: dict[int, faceteer.FaceteerError] = {}
    embeds = either.encode(BAD, on_error=bad.__setitem__)
    assert embeds.shape == (7, 512)
    assert sorted(bad) == [3, 7]
    assert bad[3].reason == "UNREADABLE_IMAGE"


def test_a_function_may_stop_the_encoding(either: Any) -> None:
    def stop(index: int, error: faceteer.FaceteerError) -> None:
        raise error

    with pytest.raises(faceteer.UnreadableImageError):
        either.encode(BAD, on_error=stop)


def test_a_stream_that_breaks_is_opened_again_and_only_what_is_missing_is_sent(either: Any, server: FakeServer) -> None:
    server.fail("StreamEncodeImages", Fault("UNAVAILABLE", after=6), Fault("UNAVAILABLE", after=4))
    np.testing.assert_array_equal(either.encode(PICTURES, batch_size=4), expected(PICTURES))
    assert server.names().count("StreamEncodeImages") == 3
    assert server.names().count("item") <= 25 + 2 * 2


def test_a_stream_that_always_breaks_fails_after_its_retries(either: Any, server: FakeServer) -> None:
    server.fail("StreamEncodeImages", *[Fault("UNAVAILABLE")] * 9)
    with pytest.raises(faceteer.UnavailableError):
        either.encode(PICTURES)
    assert server.names().count("StreamEncodeImages") == 5


def test_a_picture_that_meets_a_full_queue_is_sent_again_when_the_server_said(either: Any, server: FakeServer) -> None:
    full = Fault("RESOURCE_EXHAUSTED", "QUEUE_FULL", retry_after=0.05)
    server.fail("item", full, full, full)
    np.testing.assert_array_equal(either.encode(PICTURES[:5]), expected(PICTURES[:5]))
    assert server.names().count("item") == 8


def test_a_picture_that_meets_a_full_queue_until_the_deadline_fails_with_its_index(
    either: Any, server: FakeServer
) -> None:
    server.fail("item", *[Fault("RESOURCE_EXHAUSTED", "QUEUE_FULL", retry_after=0.01)] * 50)
    with pytest.raises(faceteer.QueueFullError) as raised:
        either.encode(PICTURES[:1], timeout=6.0)
    assert raised.value.index == 0
    # Waits grow from 0.1 s and the server is well: the number of tries is not what ends it.
    assert server.names().count("item") > 5


def test_a_source_that_fails_fails_the_encoding_with_its_own_error(either: Any) -> None:
    def source() -> Iterator[bytes]:
        yield PICTURES[0]
        raise KeyError("the disk is gone")

    with pytest.raises(KeyError, match="the disk is gone"):
        either.encode(source())


def test_a_source_slower_than_the_deadline_is_waited_for(server: FakeServer) -> None:
    import time

    def source() -> Iterator[bytes]:
        for picture in PICTURES[:3]:
            time.sleep(0.5)
            yield picture

    timeouts = faceteer.Timeouts(bulk=0.4)
    with faceteer.connect(server.address, timeout=timeouts, retries=0) as client:
        np.testing.assert_array_equal(client.encode(source()), expected(PICTURES[:3]))


def test_a_server_that_does_not_answer_meets_the_deadline(server: FakeServer) -> None:
    server.answer_seconds = 3
    with (
        faceteer.connect(server.address, timeout=faceteer.Timeouts(bulk=0.3), retries=0) as client,
        pytest.raises(faceteer.DeadlineExceededError),
    ):
        client.encode(PICTURES[:4])


def test_a_long_encoding_renews_its_stream(either: Any, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("_async", "_sync"):
        monkeypatch.setattr(f"faceteer.{kind}.bulk._PICTURES_A_STREAM", 10)
    np.testing.assert_array_equal(either.encode(PICTURES, batch_size=2), expected(PICTURES))
    assert server.names().count("StreamEncodeImages") == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"pictures": 42}, "not iterable"),
        ({"pictures": "boat.png"}, "one picture"),
        ({"pictures": b"bytes"}, "one picture"),
        ({"pictures": [], "batch_size": 0}, "batch_size"),
        ({"pictures": [], "on_error": "ignore"}, "raise, skip, nan or a function"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    client: faceteer.Client, server: FakeServer, arguments: dict[str, Any], says: str
) -> None:
    pictures = arguments.pop("pictures")
    with pytest.raises(faceteer.InvalidArgumentError, match=says):
        client.encode(pictures, **arguments)
    assert server.calls == []


def test_texts_are_encoded_in_as_many_calls_as_the_limit_asks_for(either: Any, server: FakeServer) -> None:
    texts = ["a" * n for n in range(1, 11)]
    embeds = either.encode_texts(texts)
    assert embeds.shape == (10, 512)
    assert [int(row.argmax()) for row in embeds] == list(range(1, 11))
    assert server.names() == ["GetStudio", "EncodeTexts", "EncodeTexts", "EncodeTexts"]


def test_a_bad_text_raises_with_its_index(either: Any) -> None:
    with pytest.raises(faceteer.InvalidArgumentError, match="item 5: an empty text") as raised:
        either.encode_texts(["a"] * 5 + [""])
    assert raised.value.index == 5


def test_no_texts_are_an_array_of_no_rows_and_one_string_is_refused(either: Any) -> None:
    assert either.encode_texts([]).shape == (0, 512)
    with pytest.raises(faceteer.InvalidArgumentError, match="pass a list"):
        either.encode_texts("night")


def test_pictures_that_arrive_between_failures_give_an_encoding_its_retries_back(
    either: Any, server: FakeServer
) -> None:
    server.fail("StreamEncodeImages", *[Fault("UNAVAILABLE", after=2)] * 8)
    np.testing.assert_array_equal(either.encode(PICTURES, batch_size=4), expected(PICTURES))
    assert server.names().count("StreamEncodeImages") == 9


def test_the_longest_wait_that_a_stream_was_told_is_kept(client: faceteer.Client, server: FakeServer) -> None:
    import time

    longer, shorter = (Fault("RESOURCE_EXHAUSTED", "QUEUE_FULL", retry_after=seconds) for seconds in (0.4, 0.01))
    server.fail("item", longer, shorter)
    started = time.monotonic()
    client.encode(PICTURES[:2])
    assert time.monotonic() - started >= 0.4


def test_the_window_is_filled_at_once_on_a_stream_that_works(client: faceteer.Client, server: FakeServer) -> None:
    writes: list[int] = []
    answered = 0

    def source() -> Iterator[bytes]:
        for picture in PICTURES:
            writes.append(answered)
            yield picture

    def note(done: int, total: int | None) -> None:
        nonlocal answered
        answered = done

    server.fail("StreamEncodeImages", Fault("UNAVAILABLE", after=2))
    client.encode(source(), batch_size=3, progress=note)
    assert writes[:6] == [0] * 6, "all of the window at first"
    assert server.names().count("StreamEncodeImages") == 2


def test_progress_counts_pictures_that_failed_too(either: Any) -> None:
    seen: list[tuple[int, int | None]] = []
    either.encode(BAD, on_error="skip", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, len(BAD)) for n in range(1, len(BAD) + 1)]


def test_a_stream_that_ends_with_pictures_unanswered_is_a_failure_like_any_other(
    either: Any, server: FakeServer
) -> None:
    server.fail("StreamEncodeImages", Fault("OK", after=4))
    np.testing.assert_array_equal(either.encode(PICTURES), expected(PICTURES))
    server.fail("StreamEncodeImages", *[Fault("OK")] * 9)
    with pytest.raises(faceteer.UnavailableError, match="pictures unanswered"):
        either.encode(PICTURES)
    assert server.names().count("StreamEncodeImages") == 2 + 5


@pytest.mark.parametrize("wrong", [42, None, np.ones((2, 2)), b""])
def test_what_is_no_picture_at_all_is_named_by_its_index_and_never_sent(
    either: Any, server: FakeServer, wrong: Any
) -> None:
    with pytest.raises(faceteer.InvalidArgumentError, match="item 1: picture") as raised:
        either.encode([PICTURES[0], wrong, PICTURES[1]])
    assert (raised.value.index, raised.value.field) == (1, "picture")
    assert either.encode([PICTURES[0], wrong, PICTURES[1]], on_error="skip").shape == (2, 512)
