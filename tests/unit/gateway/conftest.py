"""A gateway before a small studio and library that do as a test tells them, in one server and one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from types import SimpleNamespace
from typing import Any

import faceteer_gateway.service
import pytest
from compose_processes import free_port
from faceteer.v1 import generator_pb2, library_pb2, library_pb2_grpc, studio_pb2, studio_pb2_grpc
from faceteer_gateway.settings import GatewaySettings
from faceteer_runtime.errors import IconNotMade, InvalidField, QueueFull
from faceteer_runtime.request import request_context
from faceteer_runtime.server import start
from faceteer_runtime.service import Resources, Service


class Studio(studio_pb2_grpc.StudioServiceServicer):
    """Answers by the picture's first bytes; remembers what it saw."""

    def __init__(self) -> None:
        self.seen: Any = None
        self.time_left: float | None = None
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.sent = 0

    async def OpenImage(self, request: studio_pb2.OpenImageRequest, context: Any) -> studio_pb2.OpenImageResponse:
        self.seen, self.time_left = request_context(), context.time_remaining()
        image = request.input.image
        if image == b"bad":
            raise InvalidField("input.image", "is not a picture")
        if image == b"full":
            raise QueueFull(2.5)
        if image == b"bug":
            raise ZeroDivisionError("secret")
        if image == b"wait":
            await self._for_ever()
        return studio_pb2.OpenImageResponse(
            l0=len(image), features=[studio_pb2.NamedFeature(index=0, label="né ☃"), studio_pb2.NamedFeature(index=1)]
        )

    async def EditImage(
        self, request: studio_pb2.EditImageRequest, context: Any
    ) -> AsyncIterator[studio_pb2.EditImageResponse]:
        image = request.input.image
        count, size = (10_000, 1 << 20) if image == b"flood" else (3, 10)
        for _ in range(count):
            self.sent += 1
            yield studio_pb2.EditImageResponse(image=generator_pb2.Image(data=b"p" * size))
            self.begun.set()
            if image == b"wait":
                await self._for_ever()
            if image == b"flood":
                await asyncio.sleep(0)
        if image == b"bad":
            raise InvalidField("edits[0]", "is not an edit")

    async def _for_ever(self) -> None:
        self.begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class Library(library_pb2_grpc.LibraryServiceServicer):
    """Has icons of features below 10, and two examples."""

    def __init__(self) -> None:
        self.icons_asked = 0

    async def GetLibrary(self, request: Any, context: Any) -> library_pb2.GetLibraryResponse:
        return library_pb2.GetLibraryResponse(revision="r1")

    async def GetFeatureIcon(
        self, request: library_pb2.GetFeatureIconRequest, context: Any
    ) -> library_pb2.GetFeatureIconResponse:
        self.icons_asked += 1
        if request.feature.index >= 10:
            raise IconNotMade(request.feature.index)
        return library_pb2.GetFeatureIconResponse(icon=b"RIFF icon")

    async def ListFeatureExamples(
        self, request: library_pb2.ListFeatureExamplesRequest, context: Any
    ) -> library_pb2.ListFeatureExamplesResponse:
        both = [library_pb2.FeatureExample(thumbnail=name) for name in (b"first", b"second")]
        return library_pb2.ListFeatureExamplesResponse(examples=both[: request.page_size])


@contextlib.asynccontextmanager
async def gateway_before_fakes(warm_up: bool = True, **settings: Any) -> AsyncIterator[SimpleNamespace]:
    studio, library = Studio(), Library()
    port = free_port()

    def build(resources: Resources) -> list[Service]:
        own = GatewaySettings.from_other(
            resources.settings,
            **{"gateway_listen": f"127.0.0.1:{port}", "gateway_studio_address": resources.address, **settings},
        )
        return [
            Service(
                "faceteer.v1.StudioService",
                lambda server: studio_pb2_grpc.add_StudioServiceServicer_to_server(studio, server),
            ),
            Service(
                "faceteer.v1.LibraryService",
                lambda server: library_pb2_grpc.add_LibraryServiceServicer_to_server(library, server),
            ),
            faceteer_gateway.service.build(
                Resources(own, resources.bundle, resources.cache, resources.metrics, resources.address)
            ),
        ]

    server = await start(GatewaySettings(listen="127.0.0.1:0", drain_seconds=1.0), build, warm_up=warm_up)
    try:
        yield SimpleNamespace(
            port=port, studio=studio, library=library, server=server, metrics=server.resources.metrics
        )
    finally:
        await server.stop(0.0)


@pytest.fixture
def gateway() -> Callable[..., AbstractAsyncContextManager[SimpleNamespace]]:
    """Starts one; keyword arguments are settings."""
    return gateway_before_fakes


@pytest.fixture
async def world() -> AsyncIterator[SimpleNamespace]:
    """One with ordinary settings."""
    async with gateway_before_fakes() as running:
        yield running
