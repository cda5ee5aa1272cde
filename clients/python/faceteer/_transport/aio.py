"""The asyncio channel. :mod:`faceteer._transport.blocking` has the same names for threads: the generated client uses
that one, and everything that differs between the two clients is in these two modules."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, Self, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from faceteer._errors import FaceteerError, ServerUnreachableError
from faceteer._transport.calls import END, Calls
from faceteer._transport.channels import Endpoint
from faceteer._transport.methods import Method

R = TypeVar("R", bound=Message)
T = TypeVar("T")
# What grpc.aio reports in place of the stream's status when the server ends it during a write.
_WRITE_FAILED = "Internal error from Core"
_EOF: Any = vars(grpc.aio)["EOF"]  # not in the published type information


class Transport(Calls):
    """One channel, of the event loop that first uses it."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint, endpoint.async_channel)

    async def unary(self, method: Method[R], request: Message, timeout: float | None) -> R:
        """One request, one response. Raises FaceteerError."""
        try:
            response: R = await self.start("unary_unary", method, request, timeout)
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

    async def close(self) -> None:
        """Cancels running calls."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    def translated(self, error: Any, timeout: float | None) -> FaceteerError:
        """gRPC's error as ours."""
        if not self._closed and error.details() == _WRITE_FAILED:
            address = self._endpoint.address
            return ServerUnreachableError(f"{address} ended the stream while it was written to", address=address)
        return super().translated(error, timeout)


class Stream(Generic[R]):
    """An open call, cancelled when its ``with`` block is left."""

    def __init__(self, transport: Transport, timeout: float | None) -> None:
        self._transport = transport
        self._timeout = timeout
        self._requests: asyncio.Queue[Any] = asyncio.Queue()
        self.call: Any = None

    async def receive(self) -> R | None:
        """The next message, or None at the end. Raises FaceteerError."""
        self._transport.check_open()
        try:
            message = await self.call.read()
        except grpc.RpcError as error:
            raise self._transport.translated(error, self._timeout) from error
        return None if message is _EOF else message

    def write(self, message: Message) -> None:
        """Queues a message; never blocks, so the caller bounds how many are in flight."""
        self._requests.put_nowait(message)

    def done_writing(self) -> None:
        """Says that no further message comes."""
        self._requests.put_nowait(END)

    async def outgoing(self) -> AsyncIterator[Any]:
        """What gRPC sends."""
        while (message := await self._requests.get()) is not END:
            yield message

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._requests.put_nowait(END)
        self.call.cancel()


async def sleep(seconds: float) -> None:
    """Waits."""
    await asyncio.sleep(seconds)


async def work(function: Callable[[], T]) -> T:
    """Runs what blocks (reading a file, decoding a picture) on another thread."""
    return await asyncio.to_thread(function)


async def tell(callback: Callable[..., Any], *arguments: Any) -> None:
    """Calls the user's callback, and awaits what it returns when that is awaitable."""
    answer = callback(*arguments)
    if inspect.isawaitable(answer):
        await answer


def items_of(source: Any) -> Any:
    """An iterator over an iterable or an async one. Raises TypeError for anything else."""
    return aiter(source) if hasattr(source, "__aiter__") else iter(source)


async def next_item(items: Any) -> Any:
    """The next of :func:`items_of`, or END."""
    return await anext(items, END) if hasattr(items, "__anext__") else next(items, END)


def fetch_for_view(fetch: Callable[[], Awaitable[None]]) -> None:
    """Nothing: a notebook asks for a view without awaiting, so it shows what was fetched already."""
