"""A server's life: warm-up, health, draining, endpoints, and every way of not starting."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from faceteer.v1 import encoder_pb2, encoder_pb2_grpc, sae_pb2_grpc
from faceteer_runtime.bundle import Bundle, BundleError
from faceteer_runtime.cache import Cache
from faceteer_runtime.errors import Draining
from faceteer_runtime.execution import execution
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.server import RunningServer, StartupError, start
from faceteer_runtime.service import Resources, Service
from faceteer_runtime.settings import ServiceSettings
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

ENCODER, SAE = "faceteer.v1.EncoderService", "faceteer.v1.SaeService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Toy(encoder_pb2_grpc.EncoderServiceServicer):
    """An encoder that only says its revision, when it is let."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()
        self.warm = asyncio.Event()
        self.warm.set()
        self.inside = 0
        self.finished = 0
        self.warm_up_error: Exception | None = None
        self.closed: list[str] = []

    async def GetEncoder(self, request, context):
        self.inside += 1
        await self.go.wait()
        self.finished += 1
        return encoder_pb2.GetEncoderResponse(revision="toy")

    async def EncodeTexts(self, request, context):
        return encoder_pb2.EncodeTextsResponse(execution=execution("toy", True, 1, 2, 3))

    async def warm_up(self) -> None:
        await self.warm.wait()
        if self.warm_up_error is not None:
            raise self.warm_up_error

    def services(self, resources: Resources) -> list[Service]:
        async def close_encoder() -> None:
            self.closed.append("encoder")
            raise RuntimeError("closing is not what it was")

        async def close_sae() -> None:
            self.closed.append("sae")

        return [
            Service(
                ENCODER,
                lambda server: encoder_pb2_grpc.add_EncoderServiceServicer_to_server(self, server),
                self.warm_up,
                close_encoder,
            ),
            Service(
                SAE,
                lambda server: sae_pb2_grpc.add_SaeServiceServicer_to_server(sae_pb2_grpc.SaeServiceServicer(), server),
                close=close_sae,
            ),
        ]


class Servers:
    def __init__(self) -> None:
        self.running: list[RunningServer] = []

    async def start(self, toy: Toy, *, warm_up: bool = True, **settings) -> RunningServer:
        settings = ServiceSettings(**{"listen": "127.0.0.1:0", "drain_seconds": 5, **settings})
        server = await start(settings, toy.services, resources(settings), warm_up=warm_up)
        self.running.append(server)
        return server


def resources(settings: ServiceSettings) -> Resources:
    metrics = Metrics()
    return Resources(settings, Bundle.none(), Cache(0, metrics), metrics)


@pytest.fixture
async def servers() -> AsyncIterator[Servers]:
    servers = Servers()
    yield servers
    for server in servers.running:
        await server.stop(0)


@pytest.fixture
async def toy() -> Toy:
    return Toy()


def retry_info(error: grpc.aio.AioRpcError) -> float:
    for any_message in rpc_status.from_call(error).details:
        if any_message.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            any_message.Unpack(retry)
            return retry.retry_delay.ToMilliseconds() / 1000
    raise AssertionError("no RetryInfo")


def reason(error: grpc.aio.AioRpcError) -> str:
    info = error_details_pb2.ErrorInfo()
    rpc_status.from_call(error).details[0].Unpack(info)
    return info.reason


async def health(channel: grpc.aio.Channel, service: str = "") -> int:
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return answer.status


async def get(channel: grpc.aio.Channel) -> str:
    request = encoder_pb2.GetEncoderRequest()
    return (await encoder_pb2_grpc.EncoderServiceStub(channel).GetEncoder(request, timeout=20)).revision


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (the condition is set by the server)
            await asyncio.sleep(0.005)


async def test_nothing_is_served_before_the_warm_up_has_passed(servers: Servers, toy: Toy) -> None:
    toy.warm.clear()
    server = await servers.start(toy, warm_up=False)
    warming = asyncio.ensure_future(server.warm_up())
    async with grpc.aio.insecure_channel(server.address) as channel:
        assert [await health(channel, name) for name in ("", ENCODER, SAE)] == [NOT_SERVING] * 3
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get(channel)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason(caught.value) == "STARTING"
        assert retry_info(caught.value) > 0
        toy.warm.set()
        await warming
        assert [await health(channel, name) for name in ("", ENCODER, SAE)] == [SERVING] * 3
        assert await get(channel) == "toy"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health(channel, "faceteer.v1.Nope")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_whoever_watches_health_sees_each_change(servers: Servers, toy: Toy) -> None:
    toy.warm.clear()
    server = await servers.start(toy, warm_up=False)
    async with grpc.aio.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=ENCODER), timeout=20)
        seen = [(await watch.read()).status]
        toy.warm.set()
        await server.warm_up()
        seen.append((await watch.read()).status)
        stopping = asyncio.ensure_future(server.stop())
        seen.append((await watch.read()).status)
        assert seen == [NOT_SERVING, SERVING, NOT_SERVING]
        await asyncio.wait_for(stopping, 5)


async def test_draining_finishes_what_has_begun_and_takes_nothing_new(servers: Servers, toy: Toy) -> None:
    server = await servers.start(toy)
    async with grpc.aio.insecure_channel(server.address) as channel:
        toy.go.clear()
        begun = asyncio.ensure_future(get(channel))
        await until(lambda: toy.inside == 1)
        stopping = asyncio.ensure_future(server.stop())
        await asyncio.sleep(0.05)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get(channel)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason(caught.value) == "DRAINING"
        assert retry_info(caught.value) > 0
        assert await health(channel) == NOT_SERVING
        assert not stopping.done()
        toy.go.set()
        assert await begun == "toy"
        await asyncio.wait_for(stopping, 5)
    assert toy.closed == ["sae", "encoder"]


async def test_a_warm_up_that_ends_after_the_draining_began_opens_nothing(servers: Servers, toy: Toy) -> None:
    toy.warm.clear()
    server = await servers.start(toy, warm_up=False)
    warming = asyncio.ensure_future(server.warm_up())
    async with grpc.aio.insecure_channel(server.address) as channel:
        assert await health(channel) == NOT_SERVING
        # What keeps the server up while it drains: a call that has begun.
        server._admission.in_flight += 1
        server._admission._idle.clear()
        stopping = asyncio.ensure_future(server.stop())
        await until(lambda: server._admission.phase == "draining")
        toy.warm.set()
        await warming
        assert [await health(channel, name) for name in ("", ENCODER, SAE)] == [NOT_SERVING] * 3
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get(channel)
        assert reason(caught.value) == "DRAINING"
        server._admission.leave()
        await asyncio.wait_for(stopping, 5)


async def test_draining_ends_though_a_call_never_does(servers: Servers, toy: Toy) -> None:
    server = await servers.start(toy, drain_seconds=0.1)
    async with grpc.aio.insecure_channel(server.address) as channel:
        toy.go.clear()
        stuck = asyncio.ensure_future(get(channel))
        await until(lambda: toy.inside == 1)
        await asyncio.wait_for(server.stop(), 5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(stuck, 5)
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert toy.finished == 0


async def test_more_calls_than_are_answered_at_once_are_refused_and_health_is_not(servers: Servers, toy: Toy) -> None:
    # Mistake 9: a server that stayed dead after an overload burst.
    server = await servers.start(toy, max_calls=3)
    async with grpc.aio.insecure_channel(server.address) as channel:
        toy.go.clear()
        calls = [asyncio.ensure_future(get(channel)) for _ in range(40)]
        await until(lambda: sum(call.done() for call in calls) == 37)
        assert await health(channel) == SERVING
        toy.go.set()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
        assert outcomes.count("toy") == 3
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert {reason(error) for error in refused} == {"QUEUE_FULL"}
        assert all(retry_info(error) > 0 for error in refused)
        assert await get(channel) == "toy"


async def test_stopping_twice_is_stopping_once(servers: Servers, toy: Toy) -> None:
    server = await servers.start(toy)
    await asyncio.gather(server.stop(), server.stop())
    await server.stop()
    assert toy.closed == ["sae", "encoder"]


async def test_an_answer_says_what_ran_and_for_which_request(servers: Servers, toy: Toy) -> None:
    server = await servers.start(toy)
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = encoder_pb2_grpc.EncoderServiceStub(channel).EncodeTexts(encoder_pb2.EncodeTextsRequest(), timeout=20)
        ran = (await call).execution
        assert (ran.model_revision, ran.cached, ran.queue_us, ran.compute_us, ran.cache_us) == ("toy", True, 1, 2, 3)
        assert dict(await call.trailing_metadata())["x-request-id"] == ran.request_id
        assert ran.request_id


async def test_a_call_that_is_not_implemented_says_so(servers: Servers, toy: Toy) -> None:
    server = await servers.start(toy)
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await encoder_pb2_grpc.EncoderServiceStub(channel).EncodeImages(
                encoder_pb2.EncodeImagesRequest(), timeout=20
            )
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("on", [True, False])
async def test_reflection_is_served_by_setting(servers: Servers, toy: Toy, on: bool) -> None:
    server = await servers.start(toy, reflection=on)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def ask():
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        call = stub.ServerReflectionInfo(ask(), timeout=20)
        if on:
            (answer,) = [answer async for answer in call]
            names = {service.name for service in answer.list_services_response.service}
            assert {ENCODER, SAE, "grpc.health.v1.Health"} <= names
        else:
            assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_prometheus_reads_the_metrics_by_setting(servers: Servers, toy: Toy) -> None:
    server = await servers.start(toy, metrics_listen="127.0.0.1:0")
    async with grpc.aio.insecure_channel(server.address) as channel:
        await get(channel)
    assert server.metrics_port

    def scrape() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as answer:
            return answer.read().decode()

    text = await asyncio.to_thread(scrape)
    assert f'faceteer_calls_total{{code="OK",method="GetEncoder",service="{ENCODER}"}} 1.0' in text
    assert "faceteer_calls_in_flight 0.0" in text
    await server.stop()
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(scrape)
    assert (await servers.start(Toy())).metrics_port is None


async def test_a_port_in_use_is_said_before_anything_is_built(servers: Servers, toy: Toy) -> None:
    server = await servers.start(toy)
    settings = ServiceSettings(listen=server.address)

    def build(_: Resources) -> Service:
        raise AssertionError("built too early")

    with pytest.raises(StartupError, match=rf"cannot listen on {server.address}"):
        await start(settings, build, resources(settings))


async def test_a_metrics_port_in_use_is_said_and_leaves_nothing_behind(servers: Servers, toy: Toy) -> None:
    first = await servers.start(toy, metrics_listen="127.0.0.1:0")
    with pytest.raises(StartupError, match="cannot serve metrics"):
        await servers.start(Toy(), metrics_listen=f"127.0.0.1:{first.metrics_port}")


async def test_a_failing_build_frees_the_port(servers: Servers, toy: Toy) -> None:
    server = await servers.start(toy)
    await server.stop()
    settings = ServiceSettings(listen=server.address)

    def build(_: Resources) -> Service:
        raise OSError("no weights")

    with pytest.raises(OSError, match="no weights"):
        await start(settings, build, resources(settings))
    assert (await servers.start(Toy(), listen=server.address)).address == server.address


async def test_a_failing_warm_up_stops_and_closes_everything(servers: Servers, toy: Toy) -> None:
    toy.warm_up_error = ValueError("the model answers nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        await servers.start(toy)
    assert toy.closed == ["sae", "encoder"]


async def test_a_missing_bundle_is_a_bundle_error(tmp_path: Path) -> None:
    settings = ServiceSettings(listen="127.0.0.1:0", bundle=tmp_path / "nowhere")
    with pytest.raises(BundleError, match="no bundle here"):
        await start(settings, lambda _: [])


async def test_services_know_where_their_process_is_reached(servers: Servers) -> None:
    seen: list[str] = []

    def build(shared: Resources) -> list[Service]:
        seen.append(shared.address)
        return []

    settings = ServiceSettings(listen="127.0.0.1:0")
    server = await start(settings, build, resources(settings))
    servers.running.append(server)
    assert seen == [server.address]
    assert server.address == f"127.0.0.1:{server.port}"


async def test_a_service_that_is_closing_may_say_draining_for_itself(servers: Servers, toy: Toy) -> None:
    toy.warm_up_error = Draining()
    with pytest.raises(Draining):
        await servers.start(toy)
