# Generated from faceteer/_async/bulk.py by clients/python/unasync.py: edit that file, then run `make client`.
"""Many pictures to one array of embeddings, over as many streams as it takes."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from faceteer._errors import (
    DeadlineExceededError,
    FaceteerError,
    UnavailableError,
    UnreadableImageError,
    invalid,
    name_picture,
)
from faceteer._models.pictures import picture_name
from faceteer._models.tensors import to_array
from faceteer._sync.connection import Connection, read_picture
from faceteer._transport.blocking import Stream, items_of, next_item, sleep, tell
from faceteer._transport.calls import END
from faceteer._transport.methods import STREAM_ENCODE_IMAGES
from faceteer._transport.retries import Attempts
from faceteer._transport.status import error_from_item
from faceteer._views.progress import Bar
from faceteer.v1 import encoder_pb2

if TYPE_CHECKING:
    import numpy.typing as npt

#: What becomes of a picture that cannot be encoded: "raise" its error (with ``.index``); "skip" its row; keep its row
#: as "nan"; or a function of (index, error), after which the row is skipped.
OnError: TypeAlias = "Literal['raise', 'skip', 'nan'] | Callable[[int, FaceteerError], Any]"

# A stream is renewed now and then, so that its deadline bounds waiting rather than work and a draining server can stop.
_PICTURES_A_STREAM = 4096
_SLOW_START = 2


class Bulk:
    """A bulk encoding: at most 2 * ``batch_size`` pictures are read and still without their final answer."""

    def __init__(
        self,
        connection: Connection,
        pictures: Any,
        *,
        batch_size: int,
        bar: Bar,
        total: int | None,
        on_error: OnError,
        timeout: float | None,
    ) -> None:
        if batch_size < 1:
            raise invalid("batch_size", f"{batch_size} is not positive; pass 1 or more")
        if not callable(on_error) and on_error not in ("raise", "skip", "nan"):
            raise invalid("on_error", f"{on_error!r} is unknown; pass raise, skip, nan or a function")
        try:
            self._items = items_of(pictures)
        except TypeError:
            kind = type(pictures).__name__
            raise invalid("pictures", f"{kind} is not iterable; pass an iterable of pictures") from None
        if isinstance(pictures, str | bytes):
            raise invalid("pictures", "one picture; pass an iterable of them, or client.open it")
        self._connection, self._bar, self._total, self._on_error = connection, bar, total, on_error
        self._attempts = connection.attempts(timeout, None)
        self._window = 2 * batch_size
        self._rows: dict[int, npt.NDArray[np.float32] | None] = {}
        self._next = 0
        self._exhausted = False
        self._answered = 0
        # Read, without a final answer: what a new stream sends again. Those sent on the current stream are in flight.
        self._pending: dict[int, bytes] = {}
        # Of the pending pictures, what their files are called, for errors.
        self._names: dict[int, str] = {}
        self._in_flight: set[int] = set()
        self._item_tries: dict[int, Attempts] = {}
        # Seconds before the next stream, where a picture met a full queue.
        self._pause: float | None = None
        self._waited = 0.0
        self._broken = False

    def encode(self) -> npt.NDArray[np.float32]:
        """float32 [n, d], in the pictures' order."""
        with self._bar:
            while self._pending or not self._exhausted:
                try:
                    self._one_stream()
                except FaceteerError as error:
                    if error.index is not None:
                        raise
                    self._in_flight.clear()
                    self._broken = True
                    if not (isinstance(error, DeadlineExceededError) and self._source_was_slow()):
                        sleep(self._attempts.pause(error))
            rows = [self._rows[index] for index in sorted(self._rows)]
            found = next((row for row in rows if row is not None), None)
            d = len(found) if found is not None else (self._connection.facts(self._attempts)).encoder.embed_dim
            missing = np.full(d, np.nan, np.float32)
            return np.stack([missing if row is None else row for row in rows]) if rows else np.empty((0, d), np.float32)

    def _one_stream(self) -> None:
        with self._connection.transport.stream(STREAM_ENCODE_IMAGES, None, self._stream_timeout()) as stream:
            self._exchange(stream)
        if self._in_flight:
            self._in_flight.clear()
            raise UnavailableError("the server ended the stream with pictures unanswered")
        if self._pause is not None:
            pause, self._pause = self._pause, None
            sleep(pause)

    def _exchange(self, stream: Stream[encoder_pb2.StreamEncodeImagesResponse]) -> None:
        opened, sent, done_writing, self._waited = time.monotonic(), 0, False, 0.0
        again = deque(self._pending)
        # A stream that follows a broken one starts slowly: asyncio's gRPC hides the status of a stream that the server
        # refuses while much is being written to it.
        limit = _SLOW_START if self._broken else self._window
        while True:
            renew = sent >= _PICTURES_A_STREAM or self._is_old(opened)
            while not done_writing and len(self._in_flight) < limit:
                if again:
                    index: int | None = again.popleft()
                elif self._exhausted or renew or len(self._pending) >= self._window:
                    break
                else:
                    index = self._read()
                if index is not None:
                    sent += 1
                    self._in_flight.add(index)
                    stream.write(encoder_pb2.StreamEncodeImagesRequest(sequence=index, image=self._pending[index]))
            if not done_writing and not again and (self._exhausted or renew or not self._in_flight):
                done_writing = True
                stream.done_writing()
            started = time.monotonic()
            try:
                message = stream.receive()
            finally:
                self._waited += time.monotonic() - started
            if message is None:
                return
            self._waited = 0.0
            self._broken, limit = False, self._window
            self._take(message)

    def _read(self) -> int | None:
        """Takes the next picture from the source; None at its end, or when the picture failed here already."""
        picture = next_item(self._items)
        if picture is END:
            self._exhausted = True
            return None
        index, self._next = self._next, self._next + 1
        try:
            self._pending[index] = read_picture(picture)
            if isinstance(picture, str | os.PathLike):
                self._names[index] = picture_name(picture)
        except FaceteerError as error:
            self._failed(index, error)
            return None
        except OSError as error:
            words = f"{picture_name(picture)}: {error.strerror or error}"
            unreadable = UnreadableImageError(words, field="picture", description=words)
            unreadable.__cause__ = error
            self._failed(index, unreadable)
            return None
        return index

    def _take(self, message: encoder_pb2.StreamEncodeImagesResponse) -> None:
        index, result = message.sequence, message.result
        if index not in self._in_flight:
            return
        self._in_flight.discard(index)
        self._attempts.progress()
        if result.WhichOneof("result") != "error":
            del self._pending[index]
            self._names.pop(index, None)
            self._rows[index] = to_array(result.embedding.embeds)
            self._count()
            return
        error = error_from_item(result.error, address=self._connection.address)
        tries = self._item_tries.setdefault(index, Attempts(self._connection.retries, self._attempts.remaining))
        try:
            # The picture stays pending for the next stream.
            self._pause = max(self._pause or 0.0, tries.pause(error))
        except FaceteerError:
            if name := self._names.pop(index, ""):
                name_picture(error, name)
            self._failed(index, error)

    def _failed(self, index: int, error: FaceteerError) -> None:
        error.index = index
        self._pending.pop(index, None)
        if self._on_error == "raise":
            raise error
        if self._on_error == "nan":
            self._rows[index] = None
        elif callable(self._on_error):
            tell(self._on_error, index, error)
        self._count()

    def _count(self) -> None:
        self._answered += 1
        self._bar.update(self._answered, self._total)
        if self._bar.callback is not None:
            tell(self._bar.callback, self._answered, self._total)

    def _stream_timeout(self) -> float | None:
        given = [limit for limit in (self._connection.timeouts.bulk, self._attempts.remaining) if limit is not None]
        return min(given) if given else None

    def _is_old(self, opened: float) -> bool:
        bulk = self._connection.timeouts.bulk
        return bulk is not None and time.monotonic() - opened > bulk / 2

    def _source_was_slow(self) -> bool:
        """Whether a stream's deadline passed though the server was hardly waited for: the source took the time."""
        bulk, remaining = self._connection.timeouts.bulk, self._attempts.remaining
        return bulk is not None and self._waited < bulk / 4 and (remaining is None or remaining > 0)
