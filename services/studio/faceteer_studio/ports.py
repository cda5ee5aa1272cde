"""The other four services as the studio calls them: one typed port each, over a channel or within the process.

Both ways end with their caller, keep its deadline, and fail with the same errors.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, TypeVar

import grpc
import grpc.aio
from faceteer.v1 import encoder_pb2, generator_pb2, library_pb2, sae_pb2
from faceteer_runtime.errors import DeadlineExceeded, FaceteerError
from faceteer_runtime.interceptors import ACCESS_KEY, REQUEST_ID_KEY
from faceteer_runtime.request import enter_request, request_context
from faceteer_runtime.upstream import CHANNEL_OPTIONS
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from faceteer_studio.upstream_errors import Fields, at_our_field, from_rpc_error

SERVICES = {
    "encoder": encoder_pb2.DESCRIPTOR.services_by_name["EncoderService"],
    "sae": sae_pb2.DESCRIPTOR.services_by_name["SaeService"],
    "generator": generator_pb2.DESCRIPTOR.services_by_name["GeneratorService"],
    "library": library_pb2.DESCRIPTOR.services_by_name["LibraryService"],
}

# Health needs no model: a service that takes longer hangs.
_HEALTH_S = 2.0

NO_FIELDS: Fields = {}
Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)
Q_contra = TypeVar("Q_contra", bound=Message, contravariant=True)
A_co = TypeVar("A_co", bound=Message, covariant=True)


@dataclass(frozen=True)
class Call:
    """One call of ours, from which child calls are made. In process it is also the context that handlers are given.

    Attributes:
        ports: the other services.
        deadline: the caller's, by the event loop's clock; None for none.
        request_id: goes to every service, so that one id finds all log lines.
        access_key: the caller's; goes to the library alone, which has a use for it.
    """

    ports: Ports
    deadline: float | None = None
    request_id: str = ""
    access_key: str = field(default="", repr=False)

    @classmethod
    def of(cls, ports: Ports, context: Any) -> Self:
        """The call that a handler of ours answers; ``context`` is the handler's."""
        remaining, request = context.time_remaining(), request_context()
        deadline = None if remaining is None else asyncio.get_running_loop().time() + remaining
        return cls(ports, deadline, request.request_id, request.access_key)

    def time_remaining(self) -> float | None:
        """Seconds until the deadline, 0 when it has passed; None for no deadline."""
        return None if self.deadline is None else max(self.deadline - asyncio.get_running_loop().time(), 0.0)

    def within(self, seconds: float) -> Self:
        """The same call with at most ``seconds`` left."""
        deadline = asyncio.get_running_loop().time() + seconds
        return replace(self, deadline=deadline if self.deadline is None else min(deadline, self.deadline))

    def on_our_own(self, seconds: float) -> Self:
        """A call for everybody's sake: with ``seconds`` of its own, as if its caller had no access key."""
        return replace(self, access_key="", deadline=asyncio.get_running_loop().time() + seconds)

    def key_for(self, service: str) -> str:
        """The access key that ``service`` is to see."""
        return self.access_key if service == "library" else ""

    def metadata(self, service: str) -> tuple[tuple[str, str], ...]:
        """What a call over a channel says of this one."""
        pairs = ((REQUEST_ID_KEY, self.request_id), (ACCESS_KEY, self.key_for(service)))
        return tuple(pair for pair in pairs if pair[1])


class Unary(Protocol[Q_contra, A_co]):
    """A method of a port. ``fields`` names our fields in its errors.

    Raises:
        FaceteerError: whatever went wrong.
    """

    async def __call__(self, request: Q_contra, call: Call, fields: Fields = ..., /) -> A_co: ...


class Streaming(Protocol[Q_contra, A_co]):
    """The same with a streamed answer. Closing the iterator ends the child call."""

    def __call__(self, request: Q_contra, call: Call, fields: Fields = ..., /) -> AsyncGenerator[A_co, None]: ...


class Transport(Protocol):
    """How one service is reached."""

    name: str

    def unary(self, method: str, request: type[Q], answer: type[A]) -> Unary[Q, A]:
        """A method with these messages."""
        ...

    def streaming(self, method: str, request: type[Q], answer: type[A]) -> Streaming[Q, A]:
        """The same for a streamed answer."""
        ...

    async def wait_serving(self) -> None:
        """Returns when the service serves."""
        ...

    async def close(self) -> None:
        """Frees connections."""
        ...


class EncoderPort:
    """EncoderService, as far as the studio calls it."""

    def __init__(self, over: Transport) -> None:
        encoder = encoder_pb2
        self.get_encoder = over.unary("GetEncoder", encoder.GetEncoderRequest, encoder.GetEncoderResponse)
        self.encode_images = over.unary("EncodeImages", encoder.EncodeImagesRequest, encoder.EncodeImagesResponse)
        self.encode_texts = over.unary("EncodeTexts", encoder.EncodeTextsRequest, encoder.EncodeTextsResponse)


class SaePort:
    """SaeService, as far as the studio calls it."""

    def __init__(self, over: Transport) -> None:
        sae = sae_pb2
        self.get_sae = over.unary("GetSae", sae.GetSaeRequest, sae.GetSaeResponse)
        self.encode_features = over.unary("EncodeFeatures", sae.EncodeFeaturesRequest, sae.EncodeFeaturesResponse)
        self.edit_embeds = over.unary("EditEmbeds", sae.EditEmbedsRequest, sae.EditEmbedsResponse)
        self.diff_features = over.unary("DiffFeatures", sae.DiffFeaturesRequest, sae.DiffFeaturesResponse)


class GeneratorPort:
    """GeneratorService, as far as the studio calls it."""

    def __init__(self, over: Transport) -> None:
        generator = generator_pb2
        self.get_generator = over.unary("GetGenerator", generator.GetGeneratorRequest, generator.GetGeneratorResponse)
        self.generate = over.streaming("Generate", generator.GenerateRequest, generator.GenerateResponse)
        self.invert_image = over.unary("InvertImage", generator.InvertImageRequest, generator.InvertImageResponse)


class LibraryPort:
    """LibraryService, as far as the studio calls it."""

    def __init__(self, over: Transport) -> None:
        library = library_pb2
        self.get_library = over.unary("GetLibrary", library.GetLibraryRequest, library.GetLibraryResponse)
        self.batch_get_features = over.unary(
            "BatchGetFeatures", library.BatchGetFeaturesRequest, library.BatchGetFeaturesResponse
        )
        self.search_features = over.unary(
            "SearchFeatures", library.SearchFeaturesRequest, library.SearchFeaturesResponse
        )
        self.get_feature_icon = over.unary(
            "GetFeatureIcon", library.GetFeatureIconRequest, library.GetFeatureIconResponse
        )


class Ports:
    """All four, over a transport each: encoder, SAE, generator, library."""

    def __init__(self, encoder: Transport, sae: Transport, generator: Transport, library: Transport) -> None:
        self.transports = (encoder, sae, generator, library)
        self.encoder = EncoderPort(encoder)
        self.sae = SaePort(sae)
        self.generator = GeneratorPort(generator)
        self.library = LibraryPort(library)


class Remote:
    """A service behind an address."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.service = SERVICES[name].full_name
        self.channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)

    def unary(self, method: str, request: type[Q], answer: type[A]) -> Unary[Q, A]:
        send: Any = self.channel.unary_unary(
            f"/{self.service}/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=answer.FromString,
        )

        async def ask(message: Q, call: Call, fields: Fields = NO_FIELDS) -> A:
            try:
                result: A = await send(message, timeout=call.time_remaining(), metadata=call.metadata(self.name))
            except grpc.aio.AioRpcError as error:
                raise at_our_field(from_rpc_error(error, self.name), fields) from None
            return result

        return ask

    def streaming(self, method: str, request: type[Q], answer: type[A]) -> Streaming[Q, A]:
        send: Any = self.channel.unary_stream(
            f"/{self.service}/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=answer.FromString,
        )

        async def ask(message: Q, call: Call, fields: Fields = NO_FIELDS) -> AsyncGenerator[A, None]:
            child = send(message, timeout=call.time_remaining(), metadata=call.metadata(self.name))
            try:
                async for event in child:
                    yield event
            except grpc.aio.AioRpcError as error:
                raise at_our_field(from_rpc_error(error, self.name), fields) from None
            finally:
                child.cancel()

        return ask

    async def is_serving(self) -> bool:
        """Its own health; a service that does not answer does not serve."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        request = health_pb2.HealthCheckRequest(service=self.service)
        try:
            answer = await stub.Check(request, timeout=_HEALTH_S)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def wait_serving(self) -> None:
        while not await self.is_serving():  # noqa: ASYNC110  # another process cannot set an event of ours
            await asyncio.sleep(0.2)

    async def close(self) -> None:
        await self.channel.close(None)


class Local:
    """A service of this process: its servicer's handlers, called without a network between.

    Takes the place of a server when a servicer registers itself, and so learns the handlers.
    """

    def __init__(self, name: str, register: Callable[[Any], None]) -> None:
        self.name = name
        self.service = SERVICES[name].full_name
        self.handlers: dict[str, Any] = {}
        register(self)

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Called by generated registration code."""
        self.handlers.update(handlers)

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Called by generated registration code, with the same handlers again."""

    def unary(self, method: str, request: type[Q], answer: type[A]) -> Unary[Q, A]:
        handle = self.handlers[method].unary_unary

        async def ask(message: Q, call: Call, fields: Fields = NO_FIELDS) -> A:
            ours = request_context()
            enter_request(call.request_id, f"/{self.service}/{method}", call.key_for(self.name))
            try:
                async with asyncio.timeout_at(call.deadline) as limit:
                    result: A = await handle(message, call)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise DeadlineExceeded(self.name) from None
            except FaceteerError as error:
                raise at_our_field(error, fields) from None
            finally:
                enter_request(ours.request_id, ours.method, ours.access_key)
            return result

        return ask

    def streaming(self, method: str, request: type[Q], answer: type[A]) -> Streaming[Q, A]:
        handle = self.handlers[method].unary_stream

        async def ask(message: Q, call: Call, fields: Fields = NO_FIELDS) -> AsyncGenerator[A, None]:
            async with contextlib.aclosing(handle(message, call)) as events:
                while True:
                    try:
                        async with asyncio.timeout_at(call.deadline) as limit:
                            event: A = await anext(events)
                    except StopAsyncIteration:
                        return
                    except TimeoutError:
                        if not limit.expired():
                            raise
                        raise DeadlineExceeded(self.name) from None
                    except FaceteerError as error:
                        raise at_our_field(error, fields) from None
                    yield event

        return ask

    async def wait_serving(self) -> None:
        """Its own warm-up ran before ours."""

    async def close(self) -> None:
        """Nothing to free."""
