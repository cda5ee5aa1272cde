"""Runs services: binds, warms up, serves, drains, stops.

Knows nothing of any one service; ``build`` makes them from the shared resources.
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
from faceteer_runtime.metrics import MetricsServer
from faceteer_runtime.service import Resources, Service, open_resources
from faceteer_runtime.settings import ServiceSettings, split_address

_log = logging.getLogger(__name__)

# After the last call has ended: for its last bytes to leave, and for open health watches to be told.
_FLUSH_S = 0.5

Build = Callable[[Resources], Sequence[Service] | Service]


class StartupError(Exception):
    """The server cannot start; one sentence says why."""


class RunningServer:
    """A server that serves (or still warms up, see :func:`start`)."""

    def __init__(
        self,
        server: grpc.aio.Server,
        port: int,
        resources: Resources,
        services: list[Service],
        health: Health,
        admission: Admission,
        own_resources: bool,
    ) -> None:
        host, _ = split_address(resources.settings.listen)
        self.port = port
        self.address = f"{'127.0.0.1' if host in ('0.0.0.0', '[::]') else host}:{port}"
        self.resources = resources
        self.services = services
        self._server = server
        self._health = health
        self._admission = admission
        self._own_resources = own_resources
        self._metrics_server: MetricsServer | None = None
        self._stopping: asyncio.Task[None] | None = None
        if resources.settings.metrics_listen is not None:
            self._metrics_server = MetricsServer(resources.metrics, resources.settings.metrics_listen)
        resources.metrics.calls_in_flight.set_function(lambda: admission.in_flight)

    @property
    def metrics_port(self) -> int | None:
        """The Prometheus endpoint's port, if there is one."""
        return self._metrics_server.port if self._metrics_server else None

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
        for service in reversed(self.services):
            try:
                await service.close()
            except Exception:
                _log.exception("closing %s", service.name)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
        if self._own_resources:
            await self.resources.cache.close()


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
    own_resources = resources is None
    if resources is None:
        resources = open_resources(settings)
    admission = Admission()
    server = grpc.aio.server(
        interceptors=(CallInterceptor(admission, resources.metrics),),
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
    # Before the models load: a port in use should not take a minute to be noticed.
    try:
        port = server.add_insecure_port(settings.listen)
    except RuntimeError:
        port = 0
    if port == 0:
        raise StartupError(f"cannot listen on {settings.listen}: in use, or not an address of this machine")
    built = build(resources)
    services = [built] if isinstance(built, Service) else list(built)
    health = Health(service.name for service in services)
    for service in services:
        service.register(server)
    await health.register(server)
    if settings.reflection:
        names = [service.name for service in services]
        reflection.enable_server_reflection([*names, "grpc.health.v1.Health", reflection.SERVICE_NAME], server)
    try:
        running = RunningServer(server, port, resources, services, health, admission, own_resources)
    except OSError as error:
        raise StartupError(f"cannot serve metrics on {settings.metrics_listen}: {error.strerror}") from None
    await server.start()
    if warm_up:
        try:
            await running.warm_up()
        except BaseException:
            await running.stop(0.0)
            raise
    return running


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
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
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
        import uvloop
    except ImportError:
        return None
    factory: Any = uvloop.new_event_loop
    return factory  # type: ignore[no-any-return]
