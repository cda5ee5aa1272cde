"""Runs operations on an asyncio gRPC channel.

Knows nothing of what they do: one branch for each effect, as in :mod:`faceteer._sync_driver`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio

from faceteer import _effects as effects
from faceteer._channels import Endpoint
from faceteer._errors import CancelledError, FaceteerError, ServerUnreachableError
from faceteer._status import error_from_call

T = TypeVar("T")
_DONE = object()
# What grpc.aio reports in place of the stream's status when the server ends it during a write.
_WRITE_FAILED = "Internal error from Core"
_EOF: Any = vars(grpc.aio)["EOF"]  # not in the published type information


class _Stream:
    """An open call, and the queue that its requests are taken from when they are many."""

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self.requests: asyncio.Queue[Any] = asyncio.Queue()
        self.call: Any = None

    async def outgoing(self) -> AsyncIterator[Any]:
        while (message := await self.requests.get()) is not _DONE:
            yield message

    def close(self) -> None:
        self.requests.put_nowait(_DONE)
        self.call.cancel()


class _Value(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


class AsyncDriver:
    """One channel, of the event loop that first uses it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._channel: Any = None
        self._calls: dict[tuple[str, str], Callable[..., Any]] = {}
        self._closed = False

    async def run(self, operation: effects.Operation[T]) -> T:
        """The operation's value. Cancelling the task cancels what is open."""
        runner = self._steps(operation)
        try:
            async for _ in runner:
                pass
        except _Value as done:
            value: T = done.value
            return value
        finally:
            await runner.aclose()
        raise RuntimeError("an operation ended without a value")

    async def iterate(self, operation: effects.Operation[None]) -> AsyncIterator[Any]:
        """What the operation emits, as it does. Ending the iteration early cancels what is open."""
        runner = self._steps(operation)
        try:
            async for value in runner:
                yield value
        except _Value:
            return
        finally:
            await runner.aclose()

    async def close(self) -> None:
        """Cancels what is under way."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def _steps(self, operation: effects.Operation[T]) -> Any:
        streams: list[_Stream] = []
        try:
            effect = next(operation)
            while True:
                if isinstance(effect, effects.Emit):
                    yield effect.value
                    effect = operation.send(None)
                    continue
                try:
                    result = await self._do(effect, streams)
                except Exception as error:
                    effect = operation.throw(error)
                else:
                    effect = operation.send(result)
        except StopIteration as stop:
            raise _Value(stop.value) from None
        finally:
            for stream in streams:
                stream.close()
            operation.close()

    async def _do(self, effect: effects.Effect, streams: list[_Stream]) -> Any:
        if self._closed:
            raise CancelledError("the client is closed")
        match effect:
            case effects.Unary(method, request, timeout):
                try:
                    return await self._call("unary_unary", method)(
                        request, timeout=timeout, metadata=self._endpoint.metadata
                    )
                except grpc.RpcError as error:
                    raise self._translated(error, timeout) from error
            case effects.OpenStream(method, request, timeout):
                stream = _Stream(timeout)
                kind = "stream_stream" if request is None else "unary_stream"
                outgoing = stream.outgoing() if request is None else request
                stream.call = self._call(kind, method)(outgoing, timeout=timeout, metadata=self._endpoint.metadata)
                streams.append(stream)
                return stream
            case effects.Receive(stream):
                try:
                    message = await stream.call.read()
                except grpc.RpcError as error:
                    raise self._translated(error, stream.timeout) from error
                return effects.END if message is _EOF else message
            case effects.Write(stream, message):
                stream.requests.put_nowait(message)
            case effects.DoneWriting(stream):
                stream.requests.put_nowait(_DONE)
            case effects.Close(stream):
                if stream is not None and stream in streams:
                    streams.remove(stream)
                    stream.close()
            case effects.Sleep(seconds):
                await asyncio.sleep(seconds)
            case effects.Next(source):
                if hasattr(source, "__anext__"):
                    return await anext(source, effects.END)
                return next(source, effects.END)
            case effects.Work(function):
                return await asyncio.to_thread(function)
            case effects.Tell(callback, arguments):
                answer = callback(*arguments)
                if inspect.isawaitable(answer):
                    await answer
        return None

    def _call(self, kind: str, method: Any) -> Callable[..., Any]:
        if self._channel is None:
            # Made here and not in __init__, so that a client can be made before its event loop.
            self._channel = self._endpoint.async_channel()
        call = self._calls.get((kind, method.path))
        if call is None:
            make = getattr(self._channel, kind)
            call = self._calls[kind, method.path] = make(
                method.path,
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=method.response.FromString,
            )
        return call

    def _translated(self, error: Any, timeout: float | None) -> FaceteerError:
        if self._closed:
            return CancelledError("the client was closed during the call")
        if error.details() == _WRITE_FAILED:
            return ServerUnreachableError(
                f"{self._endpoint.address} ended the stream while it was written to", address=self._endpoint.address
            )
        return error_from_call(
            error.code().name,
            error.details() or "",
            error.trailing_metadata(),
            address=self._endpoint.address,
            timeout=timeout,
        )
