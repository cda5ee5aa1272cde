"""Runs operations on a blocking gRPC channel.

Knows nothing of what they do: one branch for each effect, as in :mod:`faceteer._async_driver`.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import grpc

from faceteer import _effects as effects
from faceteer._channels import Endpoint
from faceteer._errors import CancelledError, FaceteerError
from faceteer._status import error_from_call

T = TypeVar("T")
_DONE = object()


class _Stream:
    """An open call, and the queue that its requests are taken from when they are many."""

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self.requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.call: Any = None

    def outgoing(self) -> Iterator[Any]:
        # Runs on a thread of gRPC's; Close and DoneWriting let it end.
        while (message := self.requests.get()) is not _DONE:
            yield message

    def close(self) -> None:
        self.requests.put(_DONE)
        self.call.cancel()


class SyncDriver:
    """One channel, usable from several threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._channel: grpc.Channel = endpoint.channel()
        self._calls: dict[tuple[str, str], Callable[..., Any]] = {}
        self._closed = False

    def run(self, operation: effects.Operation[T]) -> T:
        """The operation's value."""
        runner = self._steps(operation)
        try:
            while True:
                next(runner)
        except StopIteration as stop:
            value: T = stop.value
            return value
        finally:
            runner.close()

    def iterate(self, operation: effects.Operation[None]) -> Iterator[Any]:
        """What the operation emits, as it does. Ending the iteration early cancels what is open."""
        yield from self._steps(operation)

    def close(self) -> None:
        """Cancels what is under way."""
        self._closed = True
        self._channel.close()

    def _steps(self, operation: effects.Operation[T]) -> Generator[Any, None, T]:
        streams: list[_Stream] = []
        try:
            effect = next(operation)
            while True:
                if isinstance(effect, effects.Emit):
                    yield effect.value
                    effect = operation.send(None)
                    continue
                try:
                    result = self._do(effect, streams)
                except Exception as error:
                    effect = operation.throw(error)
                else:
                    effect = operation.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value
        finally:
            for stream in streams:
                stream.close()
            operation.close()

    def _do(self, effect: effects.Effect, streams: list[_Stream]) -> Any:
        if self._closed:
            raise CancelledError("the client is closed")
        match effect:
            case effects.Unary(method, request, timeout):
                try:
                    return self._call("unary_unary", method)(request, timeout=timeout, metadata=self._endpoint.metadata)
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
                    return next(stream.call, effects.END)
                except grpc.RpcError as error:
                    raise self._translated(error, stream.timeout) from error
            case effects.Write(stream, message):
                stream.requests.put(message)
            case effects.DoneWriting(stream):
                stream.requests.put(_DONE)
            case effects.Close(stream):
                if stream is not None and stream in streams:
                    streams.remove(stream)
                    stream.close()
            case effects.Sleep(seconds):
                time.sleep(seconds)
            case effects.Next(source):
                return next(source, effects.END)
            case effects.Work(function):
                return function()
            case effects.Tell(callback, arguments):
                callback(*arguments)
        return None

    def _call(self, kind: str, method: Any) -> Callable[..., Any]:
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
        return error_from_call(
            error.code().name,
            error.details() or "",
            error.trailing_metadata(),
            address=self._endpoint.address,
            timeout=timeout,
        )
