"""Many pictures or texts to one array of embeddings.

Knows nothing of how calls are made.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from faceteer._effects import END, Close, DoneWriting, Next, OpenStream, Operation, Receive, Sleep, Tell, Write
from faceteer._errors import (
    DeadlineExceededError,
    FaceteerError,
    InvalidArgumentError,
    UnavailableError,
    UnreadableImageError,
)
from faceteer._methods import ENCODE_TEXTS, GET_STUDIO, STREAM_ENCODE_IMAGES
from faceteer._opening import Context, read_picture
from faceteer._pictures import Picture, picture_name
from faceteer._progress import Bar
from faceteer._retries import Attempts, call
from faceteer._status import error_from_status
from faceteer._tensors import to_array
from faceteer.v1 import encoder_pb2, studio_pb2

if TYPE_CHECKING:
    import numpy.typing as npt

#: What becomes of a picture that cannot be encoded: "raise" its error (with ``.index``); "skip" its row; keep its row
#: as "nan"; or a function of (index, error), after which the row is skipped.
OnError: TypeAlias = "Literal['raise', 'skip', 'nan'] | Callable[[int, FaceteerError], Any]"

# A stream is renewed now and then, so that its deadline bounds waiting and not work, and a draining server is let go.
_PICTURES_A_STREAM = 4096
_SLOW_START = 2


def encode_pictures(
    context: Context,
    pictures: Iterable[Picture] | Any,
    *,
    batch_size: int,
    bar: Bar,
    total: int | None,
    on_error: OnError,
    timeout: float | None,
) -> Operation[npt.NDArray[np.float32]]:
    """Sends pictures on a stream, at most 2 * batch_size under way; float32 [n, d] in their order."""
    if batch_size < 1:
        raise _invalid("batch_size", f"{batch_size} is not positive; pass 1 or more")
    if not callable(on_error) and on_error not in ("raise", "skip", "nan"):
        raise _invalid("on_error", f"{on_error!r} is unknown; pass raise, skip, nan or a function")
    bulk = _Bulk(context, pictures, 2 * batch_size, bar, total, on_error, context.attempts(timeout, None))
    with bar:
        yield from bulk.run()
        rows = [bulk.rows[index] for index in sorted(bulk.rows)]
        found = next((row for row in rows if row is not None), None)
        d = len(found) if found is not None else (yield from _embed_dim(context, bulk.attempts))
        missing = np.full(d, np.nan, np.float32)
        return np.stack([missing if row is None else row for row in rows]) if rows else np.empty((0, d), np.float32)


def encode_texts(
    context: Context, texts: Sequence[str], *, timeout: float | None
) -> Operation[npt.NDArray[np.float32]]:
    """Texts to float32 [n, d], in as many calls as the server's batch limit asks for."""
    if isinstance(texts, str):
        raise _invalid("texts", "one string; pass a list of strings")
    texts = list(texts)
    attempts = context.attempts(timeout, context.timeouts.open)
    facts = (yield from call(GET_STUDIO, studio_pb2.GetStudioRequest(), attempts)).encoder
    limit = facts.max_batch or len(texts) or 1
    rows: list[npt.NDArray[np.float32]] = []
    for start in range(0, len(texts), limit):
        request = encoder_pb2.EncodeTextsRequest(texts=texts[start : start + limit])
        answer = yield from call(ENCODE_TEXTS, request, attempts)
        for offset, result in enumerate(answer.results):
            if result.WhichOneof("result") == "error":
                error = error_from_status(result.error, address=context.address)
                error.index = start + offset
                raise error
            rows.append(to_array(result.embedding.embeds))
    return np.stack(rows) if rows else np.empty((0, facts.embed_dim), np.float32)


class _Bulk:
    """Pictures under way over as many streams as it takes."""

    def __init__(
        self,
        context: Context,
        pictures: Any,
        window: int,
        bar: Bar,
        total: int | None,
        on_error: OnError,
        attempts: Attempts,
    ) -> None:
        self.attempts = attempts
        self.rows: dict[int, npt.NDArray[np.float32] | None] = {}
        self._context, self._bar, self._total, self._on_error, self._window = context, bar, total, on_error, window
        try:
            self._source = aiter(pictures) if hasattr(pictures, "__aiter__") else iter(pictures)
        except TypeError:
            kind = type(pictures).__name__
            raise _invalid("pictures", f"{kind} is not iterable; pass an iterable of pictures") from None
        if isinstance(pictures, str | bytes):
            raise _invalid("pictures", "one picture; pass an iterable of them, or client.open it")
        self._next = 0
        self._exhausted = False
        self._answered = 0
        # Read and not answered for good: what a new stream sends again. The subset on the current stream is in flight.
        self._pending: dict[int, bytes] = {}
        self._in_flight: set[int] = set()
        self._item_tries: dict[int, Attempts] = {}
        self._pause: Operation[None] | None = None
        self._waited = 0.0
        self._broken = False

    def run(self) -> Operation[None]:
        while self._pending or not self._exhausted:
            stream = None
            try:
                stream = yield OpenStream(STREAM_ENCODE_IMAGES, None, self._stream_timeout())
                yield from self._one_stream(stream)
            except FaceteerError as error:
                yield Close(stream)
                if error.index is not None:
                    raise
                self._in_flight.clear()
                self._broken = True
                if isinstance(error, DeadlineExceededError) and self._source_was_slow():
                    continue
                yield from self.attempts.after(error)

    def _one_stream(self, stream: Any) -> Operation[None]:
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
                    index = yield from self._read()
                if index is not None:
                    sent += 1
                    self._in_flight.add(index)
                    yield Write(stream, _request(index, self._pending[index]))
            if not done_writing and not again and (self._exhausted or renew or not self._in_flight):
                done_writing = True
                yield DoneWriting(stream)
            started = time.monotonic()
            try:
                message = yield Receive(stream)
            finally:
                self._waited += time.monotonic() - started
            if message is END:
                break
            self._waited = 0.0
            self._broken, limit = False, self._window
            yield from self._take(message)
        yield Close(stream)
        if self._in_flight:
            self._in_flight.clear()
            raise UnavailableError("the server ended the stream with pictures unanswered")
        if self._pause is not None:
            pause, self._pause = self._pause, None
            yield from pause

    def _read(self) -> Operation[int | None]:
        """Takes the next picture from the source; None at its end, or when the picture failed here already."""
        picture = yield Next(self._source)
        if picture is END:
            self._exhausted = True
            return None
        index, self._next = self._next, self._next + 1
        try:
            self._pending[index] = yield from read_picture(picture)
        except FaceteerError as error:
            yield from self._failed(index, error)
            return None
        except OSError as error:
            words = f"{picture_name(picture)}: {error.strerror or error}"
            unreadable = UnreadableImageError(words, field="picture", description=words)
            unreadable.__cause__ = error
            yield from self._failed(index, unreadable)
            return None
        return index

    def _take(self, message: encoder_pb2.StreamEncodeImagesResponse) -> Operation[None]:
        index, result = message.sequence, message.result
        if index not in self._in_flight:
            return
        self._in_flight.discard(index)
        self.attempts.progress()
        if result.WhichOneof("result") != "error":
            del self._pending[index]
            self.rows[index] = to_array(result.embedding.embeds)
            yield from self._count()
            return
        error = error_from_status(result.error, address=self._context.address)
        tries = self._item_tries.setdefault(index, Attempts(self._context.retries, self.attempts.remaining))
        pause = tries.after(error)
        try:
            # Up to its Sleep: raises when waiting does not help. The picture stays pending for the next stream.
            sleep = next(pause)
        except FaceteerError:
            yield from self._failed(index, error)
            return
        seconds = sleep.seconds if isinstance(sleep, Sleep) else 0.0
        self._pause = _sleep(seconds)

    def _failed(self, index: int, error: FaceteerError) -> Operation[None]:
        error.index = index
        self._pending.pop(index, None)
        if self._on_error == "raise":
            raise error
        if self._on_error == "nan":
            self.rows[index] = None
        elif callable(self._on_error):
            yield Tell(self._on_error, (index, error))
        yield from self._count()

    def _count(self) -> Operation[None]:
        self._answered += 1
        yield from self._bar.update(self._answered, self._total)

    def _stream_timeout(self) -> float | None:
        given = [limit for limit in (self._context.timeouts.bulk, self.attempts.remaining) if limit is not None]
        return min(given) if given else None

    def _is_old(self, opened: float) -> bool:
        bulk = self._context.timeouts.bulk
        return bulk is not None and time.monotonic() - opened > bulk / 2

    def _source_was_slow(self) -> bool:
        """Whether a stream's deadline passed though the server was hardly waited for: the source took the time."""
        bulk, remaining = self._context.timeouts.bulk, self.attempts.remaining
        return bulk is not None and self._waited < bulk / 4 and (remaining is None or remaining > 0)


def _sleep(seconds: float) -> Operation[None]:
    yield Sleep(seconds)


def _request(index: int, data: bytes) -> encoder_pb2.StreamEncodeImagesRequest:
    return encoder_pb2.StreamEncodeImagesRequest(sequence=index, image=data)


def _embed_dim(context: Context, attempts: Attempts) -> Operation[int]:
    answer = yield from call(GET_STUDIO, studio_pb2.GetStudioRequest(), attempts)
    return int(answer.encoder.embed_dim)


def _invalid(field: str, description: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{field}: {description}", field=field, description=description)
