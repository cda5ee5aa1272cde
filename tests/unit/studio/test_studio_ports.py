"""Ports: the contract's own methods, deadlines, keys and request ids, and errors in our request's words."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from faceteer.v1 import generator_pb2, library_pb2, library_pb2_grpc, sae_pb2
from faceteer_runtime.errors import DeadlineExceeded, FaceteerError, InvalidField, QueueFull, UnknownFeature
from faceteer_runtime.request import enter_request, request_context
from faceteer_runtime.status import error_to_item, error_to_status
from faceteer_studio.ports import SERVICES, Call, EncoderPort, GeneratorPort, LibraryPort, Local, Ports, SaePort
from faceteer_studio.upstream_errors import at_our_field, from_item, from_status


class Recording:
    """A transport that writes down which methods a port has, with which messages."""

    def __init__(self) -> None:
        self.methods: list[tuple[str, Any, Any, bool]] = []

    def unary(self, method: str, request: Any, answer: Any) -> Any:
        self.methods.append((method, request, answer, False))

    def streaming(self, method: str, request: Any, answer: Any) -> Any:
        self.methods.append((method, request, answer, True))


@pytest.mark.parametrize(
    ("name", "port"),
    [("encoder", EncoderPort), ("sae", SaePort), ("generator", GeneratorPort), ("library", LibraryPort)],
)
def test_every_method_of_a_port_is_the_contracts(name: str, port: Any) -> None:
    recording = Recording()
    port(recording)
    assert recording.methods
    for method, request, answer, streaming in recording.methods:
        described = SERVICES[name].methods_by_name[method]
        assert described.input_type is request.DESCRIPTOR
        assert described.output_type is answer.DESCRIPTOR
        assert (described.client_streaming, described.server_streaming) == (False, streaming)


NOWHERE: Any = SimpleNamespace()


async def test_a_call_knows_its_time_and_gives_less_of_it_but_never_more() -> None:
    now = asyncio.get_running_loop().time()
    assert Call(NOWHERE).time_remaining() is None
    assert Call(NOWHERE, now + 10).time_remaining() == pytest.approx(10, abs=0.5)
    assert Call(NOWHERE, now - 10).time_remaining() == 0.0
    assert Call(NOWHERE).within(2).time_remaining() == pytest.approx(2, abs=0.5)
    assert Call(NOWHERE, now + 10).within(2).time_remaining() == pytest.approx(2, abs=0.5)
    assert Call(NOWHERE, now + 1).within(2).time_remaining() == pytest.approx(1, abs=0.5)


async def test_a_call_is_made_of_the_request_that_is_answered() -> None:
    enter_request("the-id", "/x", "the-key")
    call = Call.of(NOWHERE, SimpleNamespace(time_remaining=lambda: 5.0))
    assert call.time_remaining() == pytest.approx(5, abs=0.5)
    assert (call.request_id, call.access_key) == ("the-id", "the-key")
    assert Call.of(NOWHERE, SimpleNamespace(time_remaining=lambda: None)).deadline is None
    assert "the-key" not in repr(call)


async def test_the_library_alone_is_told_the_access_key() -> None:
    call = Call(NOWHERE, None, "id", "key")
    assert call.metadata("library") == (("x-request-id", "id"), ("x-faceteer-access", "key"))
    assert call.metadata("sae") == (("x-request-id", "id"),)
    assert call.on_our_own(2).metadata("library") == (("x-request-id", "id"),)
    assert Call(NOWHERE).metadata("library") == ()


class Handlers(library_pb2_grpc.LibraryServiceServicer):
    """What a handler in the process is called with."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, str, str]] = []
        self.failure: BaseException | None = None
        self.closed = False

    async def GetLibrary(self, request: Any, context: Any) -> library_pb2.GetLibraryResponse:
        self.seen.append((context, request_context().request_id, request_context().access_key))
        if self.failure is not None:
            raise self.failure
        return library_pb2.GetLibraryResponse(revision="lib1")

    async def GetFeature(self, request: Any, context: Any) -> library_pb2.GetFeatureResponse:
        await asyncio.sleep(60)
        raise AssertionError


def local(name: str, servicer: Any) -> Local:
    return Local(name, lambda server: library_pb2_grpc.add_LibraryServiceServicer_to_server(servicer, server))


async def test_a_handler_in_the_process_gets_the_call_as_its_context_and_the_request_comes_back() -> None:
    handlers = Handlers()
    ask = local("library", handlers).unary("GetLibrary", library_pb2.GetLibraryRequest, library_pb2.GetLibraryResponse)
    ours = enter_request("ours", "/door", "our-key")
    call = Call(NOWHERE, asyncio.get_running_loop().time() + 5, "child", "key")
    assert (await ask(library_pb2.GetLibraryRequest(), call)).revision == "lib1"
    assert handlers.seen == [(call, "child", "key")]
    assert handlers.seen[0][0].time_remaining() == pytest.approx(5, abs=0.5)
    assert request_context() == ours
    handlers.failure = InvalidField("x.y", "wrong")
    with pytest.raises(InvalidField, match=r"our\.y: wrong"):
        await ask(library_pb2.GetLibraryRequest(), call.on_our_own(2), {"x": "our"})
    assert handlers.seen[1][2] == ""
    assert request_context() == ours, "after a failure too"
    elsewhere = local("sae", handlers).unary(
        "GetLibrary", library_pb2.GetLibraryRequest, library_pb2.GetLibraryResponse
    )
    handlers.failure = None
    await elsewhere(library_pb2.GetLibraryRequest(), call)
    assert handlers.seen[2][2] == "", "only the library has a use for a key"


async def test_a_deadline_that_passes_in_the_process_names_the_service_and_no_other_timeout_does() -> None:
    handlers = Handlers()
    transport = local("library", handlers)
    soon = Call(NOWHERE, asyncio.get_running_loop().time() + 0.05)
    slow = transport.unary("GetFeature", library_pb2.GetFeatureRequest, library_pb2.GetFeatureResponse)
    with pytest.raises(DeadlineExceeded) as caught:
        await slow(library_pb2.GetFeatureRequest(), soon)
    assert caught.value.metadata == {"service": "library"}
    handlers.failure = TimeoutError("of the handler's own")
    ask = transport.unary("GetLibrary", library_pb2.GetLibraryRequest, library_pb2.GetLibraryResponse)
    with pytest.raises(TimeoutError, match="handler's own"):
        await ask(library_pb2.GetLibraryRequest(), Call(NOWHERE))


class Streaming:
    """A streamed method, registered as generated code does."""

    def __init__(self) -> None:
        self.ended = 0
        self.failure: BaseException | None = None

    async def generate(self, request: Any, context: Any) -> AsyncIterator[generator_pb2.GenerateResponse]:
        try:
            for position in range(2):
                yield generator_pb2.GenerateResponse(queued=generator_pb2.Queued(position=position))
            if self.failure is not None:
                raise self.failure
            if request.preview_every:
                await asyncio.sleep(60)
        finally:
            self.ended += 1

    def port(self) -> Any:
        handlers = {"Generate": SimpleNamespace(unary_stream=self.generate)}
        transport = Local("generator", lambda server: server.add_registered_method_handlers("x", handlers))
        return transport.streaming("Generate", generator_pb2.GenerateRequest, generator_pb2.GenerateResponse)


async def test_a_stream_in_the_process_ends_with_its_reader_its_deadline_and_its_failure() -> None:
    streaming = Streaming()
    generate = streaming.port()
    request = generator_pb2.GenerateRequest()
    assert [event.queued.position async for event in generate(request, Call(NOWHERE))] == [0, 1]
    async with contextlib.aclosing(generate(request, Call(NOWHERE))) as events:
        await anext(events)
    assert streaming.ended == 2, "a reader that leaves ends the work"
    request.preview_every = 1
    with pytest.raises(DeadlineExceeded):
        [event async for event in generate(request, Call(NOWHERE, asyncio.get_running_loop().time() + 0.05))]
    assert streaming.ended == 3
    streaming.failure = TimeoutError("of the handler's own")
    with pytest.raises(TimeoutError, match="handler's own"):
        [event async for event in generate(request, Call(NOWHERE))]
    streaming.failure = InvalidField("start.image", "no picture")
    with pytest.raises(InvalidField, match=r"keep_layout\.image: no picture"):
        [event async for event in generate(request, Call(NOWHERE), {"start.image": "keep_layout.image"})]


def test_a_field_is_renamed_by_its_longest_beginning() -> None:
    fields = {"start": "keep_layout", "start.image": "input.image", "images[1]": "b", "images": "all"}

    def renamed(field: str) -> str | None:
        return at_our_field(InvalidField(field, "wrong"), fields).field

    assert renamed("start.image") == "input.image"
    assert renamed("start.strength") == "keep_layout.strength"
    assert renamed("start") == "keep_layout"
    assert renamed("start.images") == "keep_layout.images"
    assert renamed("started") == "started"
    assert renamed("images[1].data") == "b.data"
    assert renamed("images[10]") == "all[10]"
    without = UnknownFeature("no such feature")
    assert at_our_field(without, fields) is without


@pytest.mark.parametrize(
    "passed_on",
    [lambda error: from_status(error_to_status(error)), lambda error: from_item(error_to_item(error))],
    ids=["call", "item"],
)
def test_another_services_failure_keeps_its_status_reason_details_and_words(
    passed_on: Callable[[FaceteerError], FaceteerError],
) -> None:
    failure = passed_on(QueueFull(1.5))
    assert (failure.status, failure.reason, failure.retry_after_s) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 1.5)
    assert (failure.field, failure.metadata) == (None, {})
    failure = passed_on(InvalidField("x", "wrong"))
    assert (failure.field, failure.description, failure.message, failure.retry_after_s) == (
        "x", "wrong", "x: wrong", None,
    )  # fmt: skip
    failure = passed_on(UnknownFeature("none", ["a", "b"]))
    assert failure.metadata == {"nearest": "a, b"}


def test_ports_stand_over_one_transport_each() -> None:
    transports = [Recording() for _ in range(4)]
    ports = Ports(*transports)  # type: ignore[arg-type]
    assert ports.transports == tuple(transports)
    assert [transport.methods[0][0] for transport in transports] == [
        "GetEncoder", "GetSae", "GetGenerator", "GetLibrary",
    ]  # fmt: skip
    assert transports[1].methods[0][1] is sae_pb2.GetSaeRequest
