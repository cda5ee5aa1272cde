"""Every method of the five services over Connect and gRPC-Web, made from the services' descriptors.

Every use of connectrpc is in this file. Binary messages pass through unchanged once they have been read as what they
should be; only JSON is converted.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from connectrpc.code import Code
from connectrpc.codec import Codec
from connectrpc.errors import ConnectError
from connectrpc.interceptor import MetadataInterceptor
from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from connectrpc.request import RequestContext
from connectrpc.server import ConnectASGIApplication, Endpoint
from faceteer_runtime.errors import FaceteerError
from faceteer_runtime.interceptors import ACCESS_KEY, REQUEST_ID_KEY
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.status import error_to_status
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.json_format import MessageToJson, Parse, ParseError
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import code_pb2, status_pb2
from protobuf.wkt import Any as ConnectAny

from faceteer_gateway.upstream import SERVICES, Caller, CallFailed, Upstream

# What went wrong before a call reached the studio, as the reasons of our contract.
_REASONS = {
    Code.INVALID_ARGUMENT: "INVALID_FIELD",
    Code.RESOURCE_EXHAUSTED: "MESSAGE_TOO_LARGE",
    Code.DEADLINE_EXCEEDED: "DEADLINE_EXCEEDED",
}


@dataclass(frozen=True)
class Answer:
    """An answer's bytes, and the class that reads them."""

    kind: type[Message]
    data: bytes


class _Binary(Codec[Answer, bytes]):
    def name(self) -> str:
        return "proto"

    def encode(self, message: Answer) -> bytes:
        return message.data

    def decode(self, data: bytes | bytearray, message_class: Any) -> bytes:
        request = bytes(data)
        try:
            message_class.FromString(request)
        except DecodeError as error:
            raise ConnectError(
                Code.INVALID_ARGUMENT, f"the request is not a {message_class.DESCRIPTOR.full_name}"
            ) from error
        return request


class _Json(Codec[Answer, bytes]):
    def name(self) -> str:
        return "json"

    def encode(self, message: Answer) -> bytes:
        # Without indents: Python's json is several times as fast then.
        return MessageToJson(message.kind.FromString(message.data), indent=None, ensure_ascii=False).encode()

    def decode(self, data: bytes | bytearray, message_class: Any) -> bytes:
        request: Message = message_class()
        try:
            # A misspelt field is refused rather than passed over, so that no edit is silently left out.
            Parse(bytes(data), request)
        except (ParseError, UnicodeDecodeError, RecursionError) as error:
            raise ConnectError(
                Code.INVALID_ARGUMENT,
                f"the JSON is not a {message_class.DESCRIPTOR.full_name}: {str(error)[:300]}",
            ) from error
        return request.SerializeToString()


class Calls(ConnectASGIApplication[Upstream]):
    """An ASGI application that answers every method's path.

    Args:
        upstream: the studio.
        metrics: where calls are counted.
        max_message_bytes: largest request.
    """

    def __init__(self, upstream: Upstream, metrics: Metrics, max_message_bytes: int) -> None:
        super().__init__(
            service=upstream,
            endpoints=lambda upstream: {path: _endpoint(path, method, upstream) for path, method in PATHS.items()},
            interceptors=(_Ends(metrics),),
            read_max_bytes=max_message_bytes,
            # Compressed pictures do not shrink, and a compressed stream would wait for more before it sends.
            compressions=(),
            codecs=(_Binary(), _Json()),
        )

    @property
    def path(self) -> str:
        return ""


PATHS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods
}


def _endpoint(path: str, method: MethodDescriptor, upstream: Upstream) -> Any:
    kind = GetMessageClass(method.output_type)
    info: MethodInfo[Any, Any] = MethodInfo(
        name=method.name,
        service_name=method.containing_service.full_name,
        input=GetMessageClass(method.input_type),
        output=kind,
        idempotency_level=IdempotencyLevel.UNKNOWN,
        stream_type=_stream_type(method),
    )
    if method.client_streaming:

        async def refuse(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            raise ConnectError(
                Code.UNIMPLEMENTED,
                f"{method.name} streams both ways, which browsers cannot: call it over gRPC, or send several calls of "
                f"{method.name.removeprefix('Stream')} here",
            )
            yield  # makes it the iterator that is asked for

        return Endpoint.bidi_stream(info, refuse)
    if method.server_streaming:

        async def stream(request: bytes, context: RequestContext[Any, Any]) -> AsyncIterator[Answer]:
            answers = upstream.stream(path, request, _caller(context))
            try:
                async for data in answers:
                    yield Answer(kind, data)
            except CallFailed as failed:
                raise _connect_error(failed.status) from None
            finally:
                await answers.aclose()

        return Endpoint.server_stream(info, stream)

    async def unary(request: bytes, context: RequestContext[Any, Any]) -> Answer:
        try:
            return Answer(kind, await upstream.unary(path, request, _caller(context)))
        except CallFailed as failed:
            raise _connect_error(failed.status) from None

    return Endpoint.unary(info, unary)


def _stream_type(method: MethodDescriptor) -> StreamType:
    if method.client_streaming:
        return StreamType.BIDI_STREAM
    return StreamType.SERVER_STREAM if method.server_streaming else StreamType.UNARY


def _caller(context: RequestContext[Any, Any]) -> Caller:
    headers, left = context.request_headers, context.timeout_ms
    return Caller(
        request_id=headers.get(REQUEST_ID_KEY, ""),
        access_key=headers.get(ACCESS_KEY, ""),
        timeout_s=None if left is None else max(left, 0.0) / 1000,
    )


def _connect_error(status: status_pb2.Status) -> ConnectError:
    """A status as connectrpc sends it. Its Any is a class of its own, so each detail is wrapped again."""
    name = code_pb2.Code.Name(status.code)
    details = [ConnectAny(type_url=detail.type_url, value=detail.value) for detail in status.details]
    return ConnectError(Code["CANCELED" if name == "CANCELLED" else name], status.message, details)


class _Ends(MetadataInterceptor[float]):
    """Counts calls, and gives failures that arise here the details that our services' failures have."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def on_start(self, ctx: RequestContext[Any, Any]) -> float:
        return time.perf_counter()

    async def on_end(self, token: float, ctx: RequestContext[Any, Any], error: Exception | None) -> None:
        described = None if error is None else _described(error, ctx.request_headers.get(REQUEST_ID_KEY, ""))
        code = "OK" if described is None else described.code.name
        method = (ctx.method.service_name, ctx.method.name)
        self._metrics.http_calls.labels(*method, _protocol(ctx), code).inc()
        self._metrics.http_call_seconds.labels(*method).observe(time.perf_counter() - token)
        if described is not None and described is not error:
            raise described from error


def _protocol(context: RequestContext[Any, Any]) -> str:
    kind = context.request_headers.get("content-type", "")
    return f"{'grpc-web' if 'grpc-web' in kind else 'connect'}-{'json' if 'json' in kind else 'binary'}"


def _described(error: Exception, request_id: str) -> ConnectError:
    """The failure with an ErrorInfo."""
    if isinstance(error, OSError):
        return ConnectError(Code.CANCELED, "the caller's connection broke")
    if not isinstance(error, ConnectError):
        return _connect_error(error_to_status(error, request_id))
    reason = _REASONS.get(error.code)
    if error.details or reason is None:
        return error
    ours = FaceteerError(error.message, status=error.code.name, reason=reason)
    return _connect_error(error_to_status(ours, request_id))
