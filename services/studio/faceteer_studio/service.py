"""Wires the front door together: the studio, and the other four services forwarded.

:mod:`faceteer_studio.all_in_one` wires them within one process instead.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc.aio
from faceteer.v1 import studio_pb2_grpc
from faceteer_runtime.service import Resources, Service

from faceteer_studio.application import Studio
from faceteer_studio.forwarding import forwarded
from faceteer_studio.library_front import LibraryFront
from faceteer_studio.ports import Ports, Remote
from faceteer_studio.servicer import StudioServicer, library_handlers
from faceteer_studio.settings import StudioSettings

_log = logging.getLogger(__name__)
NAME = "faceteer.v1.StudioService"


def build_over(ports: Ports, resources: Resources, wait_s: float | None = None) -> tuple[Service, dict[str, Any]]:
    """StudioService over the given ports, and the handlers that replace LibraryService's own.

    The service serves when the others do, or after ``wait_s`` seconds without those that do not; None waits for all.
    """
    studio = Studio(resources.cache)
    servicer = StudioServicer(studio, ports)

    def register(server: grpc.aio.Server) -> None:
        studio_pb2_grpc.add_StudioServiceServicer_to_server(servicer, server)

    async def warm_up() -> None:
        waiting = asyncio.gather(*(transport.wait_serving() for transport in ports.transports))
        try:
            await asyncio.wait_for(waiting, wait_s)
        except TimeoutError:
            # Each part fails alone: what needs none of those that are down works without them.
            _log.warning("not every service is up after %g s; serving without", wait_s)

    async def close() -> None:
        studio.upstreams.close()
        await asyncio.gather(*(transport.close() for transport in ports.transports))

    front = LibraryFront(studio, resources.cache)
    return Service(NAME, register, warm_up, close), library_handlers(front, ports)


def build(resources: Resources) -> list[Service]:
    """The studio, and the other four services forwarded: one address serves all five."""
    settings = StudioSettings.from_other(resources.settings)
    encoder, sae, generator, library = (
        Remote(name, getattr(settings, f"studio_{name}_address")) for name in ("encoder", "sae", "generator", "library")
    )
    ports = Ports(encoder, sae, generator, library)
    studio, before_library = build_over(ports, resources, settings.studio_wait_seconds)
    others = [forwarded(remote, ports) for remote in (encoder, sae, generator)]
    return [studio, *others, forwarded(library, ports, before_library)]
