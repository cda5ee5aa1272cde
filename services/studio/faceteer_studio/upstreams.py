"""How the studio reaches the other four services: over a channel, or within the process.

Knows nothing of the jobs. Both ways carry the remaining deadline, end with their caller, and fail with the same errors.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio
from faceteer.v1 import encoder_pb2, generator_pb2, library_pb2, sae_pb2
from faceteer_runtime.errors import DeadlineExceeded
from faceteer_runtime.interceptors import ACCESS_KEY, REQUEST_ID_KEY
from faceteer_runtime.request import request_context
from google.protobuf import symbol_database
from grpc_health.v1 import health_pb2, health_pb2_grpc

from faceteer_studio.passed_on import from_rpc_error

SERVICES = {
    "encoder": encoder_pb2.DESCRIPTOR.services_by_name["EncoderService"],
    "sae": sae_pb2.DESCRIPTOR.services_by_name["SaeService"],
    "generator": generator_pb2.DESCRIPTOR.services_by_name["GeneratorService"],
    "library": library_pb2.DESCRIPTOR.services_by_name["LibraryService"],
}

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    # A service that restarts is found again within a second, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class Upstream(Protocol):
    """One of the four services.

    ``timeout`` is in seconds, None for no deadline. Failures are raised as FaceteerError.
    """

    name: str

    async def call(self, method: str, request: Any, timeout: float | None) -> Any:
        """A unary call: request message in, response message out."""
        ...

    def stream(self, method: str, request: Any, timeout: float | None) -> AsyncIterator[Any]:
        """A call with a streamed answer. Closing the iterator cancels the call."""
        ...

    async def wait_serving(self) -> None:
        """Returns when the service serves."""
        ...

    async def close(self) -> None:
        """Frees connections."""
        ...


@dataclass
class Upstreams:
    """All four."""

    encoder: Upstream
    sae: Upstream
    generator: Upstream
    library: Upstream

    def __iter__(self) -> Any:
        return iter((self.encoder, self.sae, self.generator, self.library))


def _response_class(method: Any) -> Any:
    return symbol_database.Default().GetSymbol(method.output_type.full_name)  # type: ignore[no-untyped-call]


class RemoteUpstream:
    """A service behind an address."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.service = SERVICES[name].full_name
        self.channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._methods: dict[str, Any] = {}
        for method in SERVICES[name].methods:
            make = self.channel.unary_stream if method.server_streaming else self.channel.unary_unary
            self._methods[method.name] = make(
                f"/{self.service}/{method.name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=_response_class(method).FromString,
            )

    async def call(self, method: str, request: Any, timeout: float | None) -> Any:
        try:
            return await self._methods[method](request, timeout=timeout, metadata=request_metadata(self.name))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.name) from None

    async def stream(self, method: str, request: Any, timeout: float | None) -> AsyncIterator[Any]:
        call = self._methods[method](request, timeout=timeout, metadata=request_metadata(self.name))
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.name) from None
        finally:
            call.cancel()

    async def wait_serving(self) -> None:
        stub = health_pb2_grpc.HealthStub(self.channel)
        request = health_pb2.HealthCheckRequest(service=self.service)
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                answer = await stub.Check(request, timeout=2.0)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(0.2)

    async def close(self) -> None:
        await self.channel.close()


class LocalUpstream:
    """A service of this process: its servicer's handlers, called without a network between.

    Takes the place of a server when a servicer registers itself, and so learns the handlers.
    """

    def __init__(self, name: str, register: Callable[[Any], None]) -> None:
        self.name = name
        self.handlers: dict[str, Any] = {}
        register(self)

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Called by generated registration code."""
        self.handlers.update(handlers)

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Called by generated registration code; says nothing new."""

    async def call(self, method: str, request: Any, timeout: float | None) -> Any:
        try:
            async with asyncio.timeout(timeout):
                return await self.handlers[method].unary_unary(request, None)
        except TimeoutError:
            raise DeadlineExceeded(self.name) from None

    async def stream(self, method: str, request: Any, timeout: float | None) -> AsyncIterator[Any]:
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        async with contextlib.aclosing(self.handlers[method].unary_stream(request, None)) as responses:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        response = await anext(responses)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise DeadlineExceeded(self.name) from None
                yield response

    async def wait_serving(self) -> None:
        """Its own warm-up ran before ours."""

    async def close(self) -> None:
        """Nothing to free."""


def request_metadata(service: str) -> tuple[tuple[str, str], ...]:
    """What a child call says of the current request: its id, so that one id finds every service's log lines; and to the
    library, which alone has a use for it, the caller's access key."""
    request = request_context()
    metadata = ((REQUEST_ID_KEY, request.request_id),) if request.request_id else ()
    if service == "library" and request.access_key:
        metadata += ((ACCESS_KEY, request.access_key),)
    return metadata
