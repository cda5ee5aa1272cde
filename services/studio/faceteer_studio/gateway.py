"""The other four services at the studio's own address: every call forwarded byte for byte.

Knows nothing of messages; deadlines, cancellation, request ids, statuses and their details pass through.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import grpc.aio
from faceteer_runtime.service import Service

from faceteer_studio.passed_on import from_rpc_error
from faceteer_studio.upstreams import SERVICES, RemoteUpstream, request_metadata


def gateway(upstream: RemoteUpstream, instead: Mapping[str, Any] | None = None) -> Service:
    """A service by the upstream's name that forwards to it, but for the methods that have a handler in ``instead``."""
    handlers = {method.name: _forward(upstream, method) for method in SERVICES[upstream.name].methods}
    handlers |= instead or {}
    generic = grpc.method_handlers_generic_handler(upstream.service, handlers)
    return Service(upstream.service, lambda server: server.add_generic_rpc_handlers((generic,)))


def _forward(upstream: RemoteUpstream, method: Any) -> Any:
    path = f"/{upstream.service}/{method.name}"
    # Neither side has (de)serializers: what arrives is what leaves.
    if method.client_streaming:
        stream_stream = upstream.channel.stream_stream(path)

        async def forward_stream_stream(requests: Any, context: Any) -> AsyncIterator[bytes]:
            call = stream_stream(requests, timeout=context.time_remaining(), metadata=request_metadata(upstream.name))
            async for response in _responses(call, upstream):
                yield response

        return grpc.stream_stream_rpc_method_handler(forward_stream_stream)
    if method.server_streaming:
        unary_stream = upstream.channel.unary_stream(path)

        async def forward_unary_stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
            call = unary_stream(request, timeout=context.time_remaining(), metadata=request_metadata(upstream.name))
            async for response in _responses(call, upstream):
                yield response

        return grpc.unary_stream_rpc_method_handler(forward_unary_stream)
    unary_unary = upstream.channel.unary_unary(path)

    async def forward_unary_unary(request: bytes, context: Any) -> bytes:
        try:
            answer: bytes = await unary_unary(
                request, timeout=context.time_remaining(), metadata=request_metadata(upstream.name)
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, upstream.name) from None
        return answer

    return grpc.unary_unary_rpc_method_handler(forward_unary_unary)


async def _responses(call: Any, upstream: RemoteUpstream) -> AsyncIterator[bytes]:
    try:
        async for response in call:
            yield response
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, upstream.name) from None
    finally:
        # The caller may have left in the middle; a call that has ended does not mind.
        call.cancel()
