"""Runs services: binds, warms up, serves, drains, stops.

``build`` makes the services from the resources that they share.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection

from faceteer_runtime.admission import Admission
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.errors import FaceteerError
from faceteer_runtime.health import Health
from faceteer_runtime.interceptors import CallInterceptor
from faceteer_runtime.logs import configure_logging
from faceteer_runtime.metrics import Metrics, MetricsServer
from faceteer_runtime.service import Resources, Service, open_resources
from faceteer_runtime.settings import ServiceSettings, split_address

_log = logging.getLogger(__name__)

# After the last call has ended: for its last bytes to leave, and for open health watches to be told.
_FLUSH_S = 0.5

Build = Callable[[Resources], Sequence[Service] | Service]


class StartupError(Exception):
    """The server cannot start; one sentence says why."""


class RunningServer:
    """A server that serves, or still warms up (see :func:`start`).

    Attributes:
        port: the port bound.
        address: where a client on this machine reaches it.
        resources: what its services share.
        services: those it serves.
    """

    def __init__(
        self,
        server: grpc.aio.Server,
        services: list[Service],
        resources: Resources,
        health: Health,
        admission: Admission,
        close: contextlib.AsyncExitStack,
    ) -> None:
        self.address = resources.address
        self.port = split_address(resources.address)[1]
        self.resources = resources
        self.services = services
        self.metrics_port: int | None = None
        self._server = server
        self._health = health
        self._admission = admission
        self._close = close
        self._stopping: asyncio.Task[None] | None = None

    async def warm_up(self) -> None:
        """Warms up every service; when all have passed, calls are taken and everything is SERVING.

        Raises:
            Exception: what a warm-up raised; the server should be stopped.
        """
        for service in self.services:
            await service.warm_up()
        self._admission.open()
        if self._admission.phase == "serving":
            await self._health.all_serving()

    async def stop(self, drain_seconds: float | None = None) -> None:
        """NOT_SERVING; lets running calls finish (at most ``drain_seconds``), stops, closes. Idempotent."""
        if self._stopping is None:
            if drain_seconds is None:
                drain_seconds = self.resources.settings.drain_seconds
            self._stopping = asyncio.ensure_future(self._stop(drain_seconds))
        await asyncio.shield(self._stopping)

    async def _stop(self, drain_seconds: float) -> None:
        self._admission.drain()
        await self._health.stopping()
        if not await self._admission.wait_idle(drain_seconds):
            _log.warning("stopping with %d calls unfinished", self._admission.in_flight)
        await self._server.stop(_FLUSH_S)
        await self._close.aclose()


async def start(
    settings: ServiceSettings, build: Build, resources: Resources | None = None, *, warm_up: bool = True
) -> RunningServer:
    """Binds, builds the services, serves, and waits until their warm-ups have passed.

    Args:
        settings: ``listen`` with port 0 picks a free port, see :attr:`RunningServer.port`.
        build: makes the services; called once, on the event loop.
        resources: to share with others, who then close them; opened here and closed by ``stop`` when left out.
        warm_up: False returns at once, with everything NOT_SERVING; then ``await server.warm_up()``.

    Raises:
        StartupError: the address cannot be bound.
        BundleError: the bundle cannot be used.
    """
    async with contextlib.AsyncExitStack() as stack:
        if resources is None:
            resources = open_resources(settings)
            stack.push_async_callback(resources.cache.close)
        admission = Admission(settings.max_calls)
        server = _grpc_server(settings, CallInterceptor(admission, resources.metrics))
        # Before the models load: a port in use should not take a minute to be noticed.
        resources.address = _bind(server, settings.listen)
        started = False

        async def release() -> None:
            # One that was bound but never started keeps its port, and cannot be stopped either.
            if not started:
                await server.start()
            await server.stop(None)

        stack.push_async_callback(release)
        metrics_server = _metrics_server(settings, resources.metrics)
        if metrics_server is not None:
            stack.push_async_callback(asyncio.to_thread, metrics_server.close)
        built = build(resources)
        services = [built] if isinstance(built, Service) else list(built)
        for service in services:
            stack.push_async_callback(_close_service, service)
            service.register(server)
        health = Health({service.name: service.is_serving for service in services})
        await health.register(server)
        if settings.reflection:
            names = [
                *(service.name for service in services if service.grpc),
                "grpc.health.v1.Health",
                reflection.SERVICE_NAME,
            ]
            reflection.enable_server_reflection(names, server)
        await server.start()
        started = True
        running = RunningServer(server, services, resources, health, admission, stack.pop_all())
    resources.metrics.calls_in_flight.set_function(lambda: admission.in_flight)
    running.metrics_port = metrics_server.port if metrics_server is not None else None
    if warm_up:
        try:
            await running.warm_up()
        except BaseException:
            await running.stop(0.0)
            raise
    return running


def _grpc_server(settings: ServiceSettings, interceptor: CallInterceptor) -> grpc.aio.Server:
    return grpc.aio.server(
        interceptors=(interceptor,),
        options=(
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # Without this, a second server on the same port starts happily and takes half of the connections.
            ("grpc.so_reuseport", 0),
            # SDKs keep a connection alive between edits.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ),
    )


def _bind(server: grpc.aio.Server, listen: str) -> str:
    """Binds, and returns where a client on this machine reaches the server."""
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError:
        port = 0
    if port == 0:
        raise StartupError(f"cannot listen on {listen}: in use, or not an address of this machine")
    host, _ = split_address(listen)
    return f"{'127.0.0.1' if host in ('0.0.0.0', '[::]') else host}:{port}"


def _metrics_server(settings: ServiceSettings, metrics: Metrics) -> MetricsServer | None:
    if settings.metrics_listen is None:
        return None
    try:
        return MetricsServer(metrics, settings.metrics_listen)
    except OSError as error:
        raise StartupError(f"cannot serve metrics on {settings.metrics_listen}: {error.strerror}") from None


async def _close_service(service: Service) -> None:
    try:
        await service.close()
    except Exception:
        _log.exception("closing %s", service.name)


def run(settings: ServiceSettings, build: Build) -> None:
    """Serves until SIGTERM or SIGINT, then drains and returns. Uses uvloop where it is installed.

    Raises:
        SystemExit: 1 after one sentence on stderr when the server cannot start.
    """
    configure_logging(settings.log_level)
    # While models load, the loop is blocked; and as process 1 of a container there is no default action.
    signal.signal(signal.SIGTERM, _leave)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(settings, build))
    except (StartupError, BundleError, FaceteerError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Exception as error:
        _log.exception("cannot go on")
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


async def _serve(settings: ServiceSettings, build: Build) -> None:
    running = await start(settings, build, warm_up=False)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        # A second Ctrl-C does not wait for anything.
        loop.remove_signal_handler(signal.SIGINT)
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, interrupt)
    stopping = asyncio.ensure_future(stop.wait())
    warming = asyncio.ensure_future(running.warm_up())
    try:
        await asyncio.wait({stopping, warming}, return_when=asyncio.FIRST_COMPLETED)
        if warming.done():
            warming.result()
            names = ", ".join(service.name for service in running.services)
            _log.info("serving %s on %s", names, running.address)
            await stopping
        _log.info("stopping")
    finally:
        stopping.cancel()
        warming.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await warming
        await running.stop()
    _log.info("stopped")


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # not on Windows
    except ImportError:
        return None
    factory: Any = uvloop.new_event_loop
    return factory  # type: ignore[no-any-return]
