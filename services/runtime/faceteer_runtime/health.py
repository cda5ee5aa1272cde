"""Health per service: NOT_SERVING until the warm-up has passed, NOT_SERVING again when draining begins."""

from __future__ import annotations

from collections.abc import Iterable

import grpc.aio
from grpc_health.v1 import _async as health_aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """The standard health service over a set of names; "" stands for all of them together."""

    def __init__(self, services: Iterable[str]) -> None:
        self._names = ("", *services)
        self._servicer = health_aio.HealthServicer()

    async def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to ``server``, everything NOT_SERVING (gRPC's own servicer begins with SERVING for "")."""
        for name in self._names:
            await self._servicer.set(name, _NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def all_serving(self) -> None:
        """Every service has passed its warm-up."""
        for name in self._names:
            await self._servicer.set(name, _SERVING)

    async def stopping(self) -> None:
        """NOT_SERVING for good."""
        await self._servicer.enter_graceful_shutdown()
