"""What happens around every call: request id, admission, errors to statuses, metrics.

One interceptor wraps all four kinds of RPC; each wrapped handler is made once per
method and kept, so a call costs a dictionary look-up and a few microseconds of bookkeeping.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from faceteer_runtime.admission import Admission
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.request import (
    RequestContext,
    enter_request,
    new_request_id,
    request_context,
    sane_request_id,
)
from faceteer_runtime.status import DETAILS_KEY, error_to_status, status_code

__all__ = ["ACCESS_KEY", "REQUEST_ID_KEY", "CallInterceptor", "RequestContext", "request_context"]

REQUEST_ID_KEY = "x-request-id"
ACCESS_KEY = "x-faceteer-access"
_LONGEST_ACCESS_KEY = 256

_log = logging.getLogger(__name__)
# Called by load balancers and tools before anything is ready: neither refused nor counted.
_INFRASTRUCTURE = ("/grpc.health.", "/grpc.reflection.")

Behaviour = Callable[[Any, Any], Any]
if TYPE_CHECKING:
    # Generic in the stubs only.
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _Interceptor = grpc.aio.ServerInterceptor


class CallInterceptor(_Interceptor):
    """Wraps every handler of ours."""

    def __init__(self, admission: Admission, metrics: Metrics) -> None:
        self._admission = admission
        self._metrics = metrics
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, wrapped; None for an unknown method, which gRPC answers with UNIMPLEMENTED."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is not None:
            return wrapped
        handler = await continuation(handler_call_details)
        if handler is None or method.startswith(_INFRASTRUCTURE):
            return handler
        # Only methods that exist get here, so the dictionary is bounded.
        wrapped = self._wrapped[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: Any) -> Any:
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._streaming(method, handler.stream_stream), **codecs)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._streaming(method, handler.unary_stream), **codecs)
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(self._unary(method, handler.stream_unary), **codecs)
        return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), **codecs)

    def _unary(self, method: str, behaviour: Behaviour) -> Behaviour:
        call = _Calls(method, self._metrics)
        admission = self._admission

        async def answer(request: Any, context: Any) -> Any:
            request_id = _begin(method, context)
            started = time.perf_counter()
            code = "OK"
            admitted = False
            try:
                admission.enter()
                admitted = True
                return await behaviour(request, context)
            except BaseException as error:
                code, ended = await _end(error, context, request_id, call)
                raise ended from None
            finally:
                if admitted:
                    admission.leave()
                call.done(code, time.perf_counter() - started)

        return answer

    def _streaming(self, method: str, behaviour: Behaviour) -> Behaviour:
        call = _Calls(method, self._metrics)
        admission = self._admission

        # A coroutine that writes, whichever style the servicer's own handler has: wrapping a coroutine-style handler
        # in an async generator would lose its writes (grpc #28728).
        async def answer(request: Any, context: Any) -> None:
            request_id = _begin(method, context)
            started = time.perf_counter()
            code = "OK"
            admitted = False
            try:
                admission.enter()
                admitted = True
                responses = behaviour(request, context)
                if inspect.isawaitable(responses):
                    await responses
                else:
                    # Closed here rather than by the garbage collector: leaving must stop the work behind it.
                    async with contextlib.aclosing(responses):
                        async for response in responses:
                            await context.write(response)
            except BaseException as error:
                code, ended = await _end(error, context, request_id, call)
                raise ended from None
            finally:
                if admitted:
                    admission.leave()
                call.done(code, time.perf_counter() - started)

        return answer


class _Calls:
    """Metrics of one method, with its labels looked up once."""

    def __init__(self, method: str, metrics: Metrics) -> None:
        self.service, _, self.method = method.strip("/").rpartition("/")
        self._counter = metrics.calls
        self._seconds = metrics.call_seconds.labels(self.service, self.method)
        self._by_code: dict[str, Any] = {}

    def done(self, code: str, seconds: float) -> None:
        counter = self._by_code.get(code)
        if counter is None:
            counter = self._by_code[code] = self._counter.labels(self.service, self.method, code)
        counter.inc()
        self._seconds.observe(seconds)


def _begin(method: str, context: Any) -> str:
    request_id, access_key = None, ""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and request_id is None:
            request_id = sane_request_id(value)
        elif key == ACCESS_KEY and isinstance(value, str) and len(value) <= _LONGEST_ACCESS_KEY:
            access_key = value
    if request_id is None:
        request_id = new_request_id()
    enter_request(request_id, method, access_key)
    context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
    return request_id


async def _end(error: BaseException, context: Any, request_id: str, call: _Calls) -> tuple[str, BaseException]:
    """Answers a failed call. Returns the code's name, and what to raise so that gRPC takes the call for ended."""
    if isinstance(error, grpc.aio.AbortError):
        # The servicer has set the status itself.
        return _name(context.code()), error
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # The caller went away, its deadline passed, or the server stops: gRPC cancelled this task and knows.
            remaining = context.time_remaining()
            return "DEADLINE_EXCEEDED" if remaining is not None and remaining <= 0 else "CANCELLED", error
        # Something that the handler waited for was cancelled inside. Left alone, this would make gRPC believe that the
        # call was cancelled, and the caller would wait for ever (grpc #29248).
        inner = RuntimeError("work that this call waited for was cancelled")
        inner.__cause__ = error
        error = inner
    elif isinstance(error, NotImplementedError) and _name(context.code()) == "UNIMPLEMENTED":
        # As a generated servicer does for a method that its subclass does not implement.
        return "UNIMPLEMENTED", await _aborted(context, grpc.StatusCode.UNIMPLEMENTED, "not served here", request_id)
    elif not isinstance(error, Exception | SystemExit):
        # KeyboardInterrupt: about the process. A SystemExit comes from some library's idea of an error.
        return "UNKNOWN", error
    status = error_to_status(error, request_id)
    code = status_code(status)
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s/%s: %s: %s", call.service, call.method, code.name, status.message)
    details = status.SerializeToString()
    return code.name, await _aborted(context, code, status.message, request_id, details)


async def _aborted(
    context: Any, code: grpc.StatusCode, message: str, request_id: str, details: bytes | None = None
) -> BaseException:
    """Answers with a status; what gRPC raises to say that the call is over."""
    metadata: tuple[tuple[str, str | bytes], ...] = ((REQUEST_ID_KEY, request_id),)
    if details is not None:
        metadata += ((DETAILS_KEY, details),)
    try:
        await context.abort(code, message, metadata)
    except BaseException as aborted:
        return aborted
    raise AssertionError("abort returned")


def _name(code: Any) -> str:
    if isinstance(code, grpc.StatusCode):
        return code.name
    for known in grpc.StatusCode:
        if known.value[0] == code:
            return known.name
    return "UNKNOWN"
