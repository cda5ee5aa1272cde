"""The blocking channel, usable from several threads: the same names as :mod:`faceteer._transport.aio`."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, Self, TypeVar

import grpc
from google.protobuf.message import Message

from faceteer._transport.calls import END, Calls
from faceteer._transport.channels import Endpoint
from faceteer._transport.methods import Method

R = TypeVar("R", bound=Message)
T = TypeVar("T")


class Transport(Calls):
    """One channel, usable from several threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        # Made now and not at the first call, which several threads may make at once.
        channel = endpoint.channel()
        super().__init__(endpoint, lambda: channel)

    def unary(self, method: Method[R], request: Message, timeout: float | None) -> R:
        """One request, one response. Raises FaceteerError."""
        try:
            response: R = self.start("unary_unary", method, request, timeout)
        except grpc.RpcError as error:
            raise self.translated(error, timeout) from error
        return response

    def stream(self, method: Method[R], request: Message | None, timeout: float | None) -> Stream[R]:
        """A stream of responses to one request or, without one, to those that are written to it."""
        stream: Stream[R] = Stream(self, timeout)
        if request is None:
            stream.call = self.start("stream_stream", method, stream.outgoing(), timeout)
        else:
            stream.call = self.start("unary_stream", method, request, timeout)
        return stream

    def close(self) -> None:
        """Cancels running calls."""
        self._closed = True
        self._make().close()


class Stream(Generic[R]):
    """An open call, cancelled when its ``with`` block is left."""

    def __init__(self, transport: Transport, timeout: float | None) -> None:
        self._transport = transport
        self._timeout = timeout
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.call: Any = None

    def receive(self) -> R | None:
        """The next message, or None at the end. Raises FaceteerError."""
        self._transport.check_open()
        try:
            message: R | None = next(self.call, None)
        except grpc.RpcError as error:
            raise self._transport.translated(error, self._timeout) from error
        return message

    def write(self, message: Message) -> None:
        """Queues a message; never blocks, so the caller bounds how many are in flight."""
        self._requests.put(message)

    def done_writing(self) -> None:
        """Says that no further message comes."""
        self._requests.put(END)

    def outgoing(self) -> Iterator[Any]:
        """What gRPC sends, taken on a thread of its own until END."""
        while (message := self._requests.get()) is not END:
            yield message

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._requests.put(END)
        self.call.cancel()


def sleep(seconds: float) -> None:
    """Waits."""
    time.sleep(seconds)


def work(function: Callable[[], T]) -> T:
    """Runs what blocks (reading a file, decoding a picture) where it is called."""
    return function()


def tell(callback: Callable[..., Any], *arguments: Any) -> None:
    """Calls the user's callback."""
    callback(*arguments)


def items_of(source: Any) -> Any:
    """An iterator over an iterable. Raises TypeError for anything else."""
    return iter(source)


def next_item(items: Any) -> Any:
    """The next of :func:`items_of`, or END."""
    return next(items, END)


def fetch_for_view(fetch: Callable[[], None]) -> None:
    """Fetches what a view lacks before it is shown."""
    fetch()
