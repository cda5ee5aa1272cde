"""The other four services at the studio's own address: every call forwarded byte for byte.

Deadlines, cancellation, request ids, statuses and their details pass through, and so does health.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import grpc.aio
from faceteer_runtime.service import Service

from faceteer_studio.ports import SERVICES, Call, Ports, Remote
from faceteer_studio.upstream_errors import from_rpc_error


def forwarded(remote: Remote, ports: Ports, instead: Mapping[str, Any] | None = None) -> Service:
    """A service by the remote one's name that forwards to it, except for the methods with a handler in ``instead``."""
    handlers = {method.name: _forward(remote, ports, method) for method in SERVICES[remote.name].methods}
    handlers |= instead or {}
    generic = grpc.method_handlers_generic_handler(remote.service, handlers)
    return Service(
        remote.service, lambda server: server.add_generic_rpc_handlers((generic,)), is_serving=remote.is_serving
    )


def _forward(remote: Remote, ports: Ports, method: Any) -> Any:
    # Neither side has (de)serializers: what arrives is what leaves.
    path = f"/{remote.service}/{method.name}"
    channel: Any = remote.channel  # whose types insist on (de)serializers
    if not method.server_streaming:
        unary: Any = channel.unary_unary(path)

        async def forward_unary(request: bytes, context: Any) -> bytes:
            call = Call.of(ports, context)
            try:
                answer: bytes = await unary(request, timeout=call.time_remaining(), metadata=call.metadata(remote.name))
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error, remote.name) from None
            return answer

        return grpc.unary_unary_rpc_method_handler(forward_unary)
    send: Any = channel.stream_stream(path) if method.client_streaming else channel.unary_stream(path)

    async def forward_stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        call = Call.of(ports, context)
        child = send(request, timeout=call.time_remaining(), metadata=call.metadata(remote.name))
        try:
            async for response in child:
                yield response
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, remote.name) from None
        finally:
            # The caller may have left meanwhile; cancelling a call that has ended is harmless.
            child.cancel()

    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(forward_stream)
    return grpc.unary_stream_rpc_method_handler(forward_stream)
