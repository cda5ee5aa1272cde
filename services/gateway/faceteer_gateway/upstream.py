"""The studio's address, which serves all five services: calls as bytes, and health.

The gateway calls over gRPC even where the studio runs in the same process: admission, metrics, errors, cancelling and
flow control are then the same for every caller, whichever way it came (docs/adr/0030-the-contract-over-http.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from faceteer.v1 import encoder_pb2, generator_pb2, library_pb2, sae_pb2, studio_pb2
from faceteer_runtime.interceptors import ACCESS_KEY, REQUEST_ID_KEY
from faceteer_runtime.upstream import CHANNEL_OPTIONS, status_of
from google.protobuf.descriptor import ServiceDescriptor
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICES: tuple[ServiceDescriptor, ...] = tuple(
    service
    for file in (studio_pb2, encoder_pb2, sae_pb2, generator_pb2, library_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
)
NAME = "studio"
# The studio itself gives each service behind it two seconds.
_HEALTH_TIMEOUT_S = 5.0


class CallFailed(Exception):
    """A call that the studio answered with ``status``, or did not answer."""

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


@dataclass(frozen=True)
class Caller:
    """What a call carries beside its message.

    Attributes:
        request_id: goes into every log line of the call.
        access_key: opens gated features; a secret.
        timeout_s: what is left of the caller's deadline; None for none.
    """

    request_id: str = ""
    access_key: str = field(default="", repr=False)
    timeout_s: float | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        pairs = ((REQUEST_ID_KEY, self.request_id), (ACCESS_KEY, self.access_key))
        return tuple(pair for pair in pairs if pair[1])


class Upstream:
    """One channel to the studio. Messages pass as bytes. A task that is cancelled ends its call."""

    def __init__(self, address: str) -> None:
        self._channel: Any = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._methods: dict[str, Any] = {}

    async def unary(self, path: str, request: bytes, caller: Caller) -> bytes:
        """The answer to one call.

        Raises:
            CallFailed: with the status and its details.
        """
        send = self._methods.get(path)
        if send is None:
            send = self._methods[path] = self._channel.unary_unary(path)
        try:
            answer: bytes = await send(request, timeout=caller.timeout_s, metadata=caller.metadata)
        except grpc.aio.AioRpcError as error:
            raise CallFailed(status_of(error, NAME)) from None
        return answer

    async def stream(self, path: str, request: bytes, caller: Caller) -> AsyncGenerator[bytes, None]:
        """The answers to one call; closing the iterator ends it.

        Raises:
            CallFailed: with the status and its details.
        """
        send = self._methods.get(path)
        if send is None:
            send = self._methods[path] = self._channel.unary_stream(path)
        call = send(request, timeout=caller.timeout_s, metadata=caller.metadata)
        try:
            async for answer in call:
                yield answer
        except grpc.aio.AioRpcError as error:
            raise CallFailed(status_of(error, NAME)) from None
        finally:
            # The caller may have left in the middle; a call that has ended does not mind.
            call.cancel()

    async def health(self) -> dict[str, str]:
        """The gRPC health of everything together (""), and of each service by its full name."""
        stub = health_pb2_grpc.HealthStub(self._channel)

        async def ask(service: str) -> str:
            try:
                answer = await stub.Check(
                    health_pb2.HealthCheckRequest(service=service), timeout=_HEALTH_TIMEOUT_S, wait_for_ready=False
                )
            except grpc.aio.AioRpcError as error:
                return "UNREACHABLE" if error.code() is grpc.StatusCode.UNAVAILABLE else error.code().name
            return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

        names = ["", *(service.full_name for service in SERVICES)]
        return dict(zip(names, await asyncio.gather(*map(ask, names)), strict=True))

    async def close(self) -> None:
        """Frees the connection."""
        await self._channel.close(None)
