"""What a service gives to the server, and what it gets in return."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc.aio

from faceteer_runtime.bundle import Bundle
from faceteer_runtime.cache import Cache, open_cache
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.settings import ServiceSettings


async def _nothing() -> None:
    """Nothing to warm up or to close."""


def _no_methods(server: grpc.aio.Server) -> None:
    """Nothing to add to a server."""


@dataclass
class Service:
    """One gRPC service, ready to be served; or a part that serves in another way, and lives with the server.

    Attributes:
        name: full name, "faceteer.v1.EncoderService".
        register: adds the servicer to a server.
        warm_up: runs the model once on a declared example; the service is NOT_SERVING until this has passed.
        close: frees what the service holds.
        is_serving: for a service that another process serves: whether it does now. None where this process answers.
        grpc: whether it is a gRPC service, so that reflection shows it.
    """

    name: str
    register: Callable[[grpc.aio.Server], None] = field(default=_no_methods)
    warm_up: Callable[[], Awaitable[None]] = field(default=_nothing)
    close: Callable[[], Awaitable[None]] = field(default=_nothing)
    is_serving: Callable[[], Awaitable[bool]] | None = None
    grpc: bool = True


@dataclass
class Resources:
    """What the services of one process share.

    Attributes:
        settings: of this process.
        bundle: without parts where the settings need none.
        cache: see :mod:`faceteer_runtime.cache`.
        metrics: see :mod:`faceteer_runtime.metrics`.
        address: where a client on this machine reaches this process; set before services are built.
    """

    settings: ServiceSettings
    bundle: Bundle
    cache: Cache
    metrics: Metrics
    address: str = ""


def open_resources(settings: ServiceSettings) -> Resources:
    """Opens what the settings name. Redis is not contacted yet, so it may be down.

    Raises:
        BundleError: the bundle cannot be used.
    """
    metrics = Metrics()
    bundle = Bundle.open(settings.bundle) if settings.needs_bundle else Bundle.none()
    return Resources(settings, bundle, open_cache(settings, metrics), metrics)
