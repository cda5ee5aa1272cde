"""What happens around a call, in all four shapes and both styles of handler, through a real server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from faceteer_runtime.bundle import Bundle
from faceteer_runtime.cache import Cache
from faceteer_runtime.errors import InvalidField, QueueFull
from faceteer_runtime.interceptors import request_context
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.server import RunningServer, start
from faceteer_runtime.service import Resources, Service
from faceteer_runtime.settings import ServiceSettings
from google.rpc import error_details_pb2
from grpc_status import rpc_status

SERVICE = "test.Shapes"
SHAPES = ["UnaryUnary", "UnaryStream", "UnaryStreamWriting", "StreamUnary", "StreamStream", "StreamStreamWriting"]


class Shapes:
    """Echoes bytes; a request that begins with ``!`` asks for trouble. Every shape, in both styles of streaming."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.ended: list[str] = []

    async def act(self, request: bytes, context) -> bytes:
        match request:
            case b"!field":
                raise InvalidField("name", "must be nicer")
            case b"!full":
                raise QueueFull(1.5)
            case b"!defect":
                raise ZeroDivisionError("secret detail")
            case b"!cancelled":
                inner = asyncio.get_running_loop().create_future()
                inner.cancel()
                await inner
            case b"!abort":
                await context.abort(grpc.StatusCode.DATA_LOSS, "lost")
            case b"!exit":
                raise SystemExit(3)
            case b"!hang":
                self.began.set()
                try:
                    await asyncio.sleep(60)
                finally:
                    self.ended.append(request_context().method.rpartition("/")[2])
            case b"!id":
                await asyncio.sleep(0)
                return request_context().request_id.encode()
        return request

    async def UnaryUnary(self, request, context):
        return await self.act(request, context)

    async def UnaryStream(self, request, context):
        yield b"first"
        yield await self.act(request, context)

    async def UnaryStreamWriting(self, request, context):
        await context.write(b"first")
        await context.write(await self.act(request, context))

    async def StreamUnary(self, requests, context):
        return b"".join([await self.act(request, context) async for request in requests])

    async def StreamStream(self, requests, context):
        async for request in requests:
            yield await self.act(request, context)

    async def StreamStreamWriting(self, requests, context):
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(await self.act(request, context))

    def register(self, server: grpc.aio.Server) -> None:
        def handler(shape: str):
            kind = shape.removesuffix("Writing")
            make = {
                "UnaryUnary": grpc.unary_unary_rpc_method_handler,
                "UnaryStream": grpc.unary_stream_rpc_method_handler,
                "StreamUnary": grpc.stream_unary_rpc_method_handler,
                "StreamStream": grpc.stream_stream_rpc_method_handler,
            }[kind]
            return make(getattr(self, shape))

        handlers = {shape: handler(shape) for shape in SHAPES}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


class Client:
    """Calls any shape in the same way: requests in, (answers, call) out."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel

    def call(self, shape: str, *requests: bytes, **options):
        path = f"/{SERVICE}/{shape}"
        options.setdefault("timeout", 20)

        async def stream() -> AsyncIterator[bytes]:
            for request in requests:
                yield request

        match shape.removesuffix("Writing"):
            case "UnaryUnary":
                return self.channel.unary_unary(path)(requests[0], **options)
            case "UnaryStream":
                return self.channel.unary_stream(path)(requests[0], **options)
            case "StreamUnary":
                return self.channel.stream_unary(path)(stream(), **options)
            case _:
                return self.channel.stream_stream(path)(stream(), **options)

    async def answers(self, shape: str, *requests: bytes, **options) -> tuple[list[bytes], dict[str, str | bytes]]:
        call = self.call(shape, *requests, **options)
        if "UnaryStream" in shape or "StreamStream" in shape:
            got = [answer async for answer in call]
        else:
            got = [await call]
        return got, dict(await call.trailing_metadata())

    async def error(self, shape: str, *requests: bytes, **options) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.answers(shape, *requests, **options)
        return caught.value


@pytest.fixture
async def shapes() -> Shapes:
    return Shapes()


@pytest.fixture
async def server(shapes: Shapes) -> AsyncIterator[RunningServer]:
    settings = ServiceSettings(listen="127.0.0.1:0", max_message_bytes=10_000)
    metrics = Metrics()
    resources = Resources(settings, Bundle.none(), Cache(0, metrics), metrics)
    server = await start(settings, lambda _: Service(SERVICE, shapes.register), resources)
    yield server
    await server.stop(0)


@pytest.fixture
async def client(server: RunningServer) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield Client(channel)


def details(error: grpc.aio.AioRpcError, kind):
    status = rpc_status.from_call(error)
    assert status is not None
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    for any_message in status.details:
        if any_message.Is(kind.DESCRIPTOR):
            message = kind()
            any_message.Unpack(message)
            return message
    return None


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (the condition is set by the server)
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("shape", SHAPES)
class TestEveryShape:
    async def test_answers_pass_unchanged(self, client: Client, shape: str) -> None:
        got, _ = await client.answers(shape, b"a", b"bc")
        assert b"".join(got) == {"UnaryUnary": b"a", "UnaryStream": b"firsta"}.get(
            shape.removesuffix("Writing"), b"abc"
        )

    async def test_a_callers_request_id_reaches_the_handler_and_comes_back(self, client: Client, shape: str) -> None:
        got, metadata = await client.answers(shape, b"!id", metadata=(("x-request-id", "Caller-7:x.y_z"),))
        assert got[-1] == b"Caller-7:x.y_z"
        assert metadata["x-request-id"] == "Caller-7:x.y_z"

    async def test_without_a_sane_request_id_there_is_a_new_one(self, client: Client, shape: str) -> None:
        ids = set()
        for metadata in ((), (("x-request-id", 'evil" level=info'),), (("x-request-id", "x" * 65),)):
            got, trailing = await client.answers(shape, b"!id", metadata=metadata)
            assert trailing["x-request-id"].encode() == got[-1]
            assert len(got[-1]) == 16
            ids.add(got[-1])
        assert len(ids) == 3

    async def test_our_own_errors_arrive_with_their_details(self, client: Client, shape: str) -> None:
        error = await client.error(shape, b"!field", metadata=(("x-request-id", "r1"),))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details(error, error_details_pb2.ErrorInfo).reason == "INVALID_FIELD"
        (violation,) = details(error, error_details_pb2.BadRequest).field_violations
        assert (violation.field, violation.description) == ("name", "must be nicer")
        assert dict(error.trailing_metadata())["x-request-id"] == "r1"
        full = await client.error(shape, b"!full")
        assert full.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(full, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 1500

    async def test_a_defect_is_internal_with_a_request_id_and_without_its_text(
        self, client: Client, shape: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        error = await client.error(shape, b"!defect", metadata=(("x-request-id", "r2"),))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "r2" in error.details()
        assert "secret" not in str(error.trailing_metadata()) + error.details()
        assert details(error, error_details_pb2.ErrorInfo).metadata["request_id"] == "r2"
        (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert record.request_id == "r2"
        assert "secret detail" in str(record.exc_info[1])

    async def test_a_cancellation_inside_the_server_does_not_hang_the_caller(
        self, client: Client, shape: str, server: RunningServer
    ) -> None:
        # grpc #29248
        async with asyncio.timeout(10):
            error = await client.error(shape, b"!cancelled")
        assert error.code() is grpc.StatusCode.INTERNAL
        got, _ = await client.answers(shape, b"still there")
        assert b"still there" in got

    async def test_a_handlers_own_abort_passes(self, client: Client, shape: str, server: RunningServer) -> None:
        error = await client.error(shape, b"!abort")
        assert (error.code(), error.details()) == (grpc.StatusCode.DATA_LOSS, "lost")
        labels = {"service": SERVICE, "method": shape, "code": "DATA_LOSS"}
        await until(lambda: server.resources.metrics.value("faceteer_calls_total", **labels) == 1)

    async def test_a_caller_that_goes_away_stops_the_work(
        self, client: Client, shape: str, server: RunningServer, shapes: Shapes
    ) -> None:
        call = client.call(shape, b"!hang")
        reading = asyncio.ensure_future(call.__anext__() if hasattr(call, "__anext__") else asyncio.sleep(0))
        await asyncio.wait_for(shapes.began.wait(), 10)
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await until(lambda: shapes.ended == [shape])
        labels = {"service": SERVICE, "method": shape, "code": "CANCELLED"}
        await until(lambda: server.resources.metrics.value("faceteer_calls_total", **labels) == 1)
        assert server.resources.metrics.value("faceteer_calls_in_flight") == 0

    async def test_a_deadline_that_passes_stops_the_work(self, client: Client, shape: str, shapes: Shapes) -> None:
        error = await client.error(shape, b"!hang", timeout=0.3)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: shapes.ended == [shape])

    async def test_calls_are_counted_by_code(self, client: Client, shape: str, server: RunningServer) -> None:
        await client.answers(shape, b"a")
        await client.error(shape, b"!field")
        value = server.resources.metrics.value
        labels = {"service": SERVICE, "method": shape}
        await until(lambda: value("faceteer_call_seconds_count", **labels) == 2)
        assert value("faceteer_calls_total", code="OK", **labels) == 1
        assert value("faceteer_calls_total", code="INVALID_ARGUMENT", **labels) == 1

    async def test_a_message_over_the_limit_is_refused_clearly(self, client: Client, shape: str) -> None:
        error = await client.error(shape, bytes(20_000))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in error.details()
        assert "10000" in error.details()
        got, _ = await client.answers(shape, b"small")
        assert b"small" in got


async def test_what_was_sent_before_an_error_arrives(client: Client) -> None:
    call = client.call("StreamStream", b"a", b"b", b"!field")
    got = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:  # noqa: PT012 (the loop is what raises)
        async for answer in call:
            got.append(answer)
    assert got == [b"a", b"b"]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_unknown_method_is_unimplemented_and_makes_no_label(client: Client, server: RunningServer) -> None:
    for name in ("Nope", "Nope2"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.channel.unary_unary(f"/{SERVICE}/{name}")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    text = str([sample for family in server.resources.metrics.registry.collect() for sample in family.samples])
    assert "Nope" not in text


async def test_concurrent_calls_keep_their_own_request_ids(client: Client) -> None:
    async def ask(n: int) -> bool:
        name = f"id-{n}"
        got, metadata = await client.answers("UnaryUnary", b"!id", metadata=(("x-request-id", name),))
        return got == [name.encode()] and metadata["x-request-id"] == name

    assert all(await asyncio.gather(*(ask(n) for n in range(50))))


async def test_a_handler_that_exits_does_not_take_the_server_or_the_caller_with_it(client: Client) -> None:
    async with asyncio.timeout(10):
        error = await client.error("UnaryUnary", b"!exit")
    assert error.code() is grpc.StatusCode.INTERNAL
    assert (await client.answers("UnaryUnary", b"a"))[0] == [b"a"]
