"""Wires the front door together: the studio, and gateways to the other four services.

Knows nothing of how they are done; :mod:`faceteer_studio.all_in_one` wires them within one process instead.
"""

from __future__ import annotations

import asyncio

import grpc.aio
from faceteer.v1 import studio_pb2_grpc
from faceteer_runtime.service import Resources, Service

from faceteer_studio.gateway import gateway
from faceteer_studio.library_front import LibraryFront
from faceteer_studio.servicer import StudioServicer
from faceteer_studio.settings import StudioSettings
from faceteer_studio.upstreams import RemoteUpstream, Upstreams

NAME = "faceteer.v1.StudioService"


def studio(resources: Resources, upstreams: Upstreams) -> Service:
    """StudioService over the given upstreams; serves when they all do."""
    servicer = StudioServicer(upstreams, resources.cache)

    def register(server: grpc.aio.Server) -> None:
        studio_pb2_grpc.add_StudioServiceServicer_to_server(servicer, server)

    async def warm_up() -> None:
        await asyncio.gather(*(upstream.wait_serving() for upstream in upstreams))

    async def close() -> None:
        await asyncio.gather(*(upstream.close() for upstream in upstreams))

    return Service(NAME, register, warm_up, close)


def build(resources: Resources) -> list[Service]:
    """The studio, and the other four services forwarded: one address serves all five."""
    settings = StudioSettings.from_other(resources.settings)
    upstreams = Upstreams(
        encoder=RemoteUpstream("encoder", settings.studio_encoder_address),
        sae=RemoteUpstream("sae", settings.studio_sae_address),
        generator=RemoteUpstream("generator", settings.studio_generator_address),
        library=RemoteUpstream("library", settings.studio_library_address),
    )
    front = LibraryFront(upstreams, resources.cache)
    gateways = [
        gateway(upstream, front.handlers() if upstream is upstreams.library else None) for upstream in upstreams
    ]
    return [studio(resources, upstreams), *gateways]
