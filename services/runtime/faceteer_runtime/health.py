"""Health per service: NOT_SERVING until the warm-up has passed, NOT_SERVING again when draining begins.

For a service that another process serves, health is asked of that process at every request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc.aio
from grpc_health.v1 import _async as health_aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# How often another process is asked on behalf of an open watch.
_WATCH_S = 1.0

IsServing = Callable[[], Awaitable[bool]]


class Health:
    """The standard health service over a set of names; "" stands for this process as a whole.

    Args:
        services: by full name: None for a service of this process, else what asks the process that serves it.
    """

    def __init__(self, services: Mapping[str, IsServing | None]) -> None:
        self._names = ("", *services)
        self._elsewhere = {name: ask for name, ask in services.items() if ask is not None}
        self._servicer = _Servicer(self._elsewhere)

    async def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to ``server``, everything NOT_SERVING (gRPC's own servicer begins with SERVING for "")."""
        for name in self._names:
            await self._servicer.set(name, _NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def all_serving(self) -> None:
        """Every service has passed its warm-up."""
        self._servicer.asks = True
        for name in self._names:
            if name not in self._elsewhere:
                await self._servicer.set(name, _SERVING)

    async def stopping(self) -> None:
        """NOT_SERVING for good."""
        self._servicer.asks = False
        await self._servicer.enter_graceful_shutdown()


class _Servicer:
    """gRPC's own servicer, updated with other processes' health before it answers."""

    def __init__(self, elsewhere: Mapping[str, IsServing]) -> None:
        self._told: Any = health_aio.HealthServicer()
        self.set, self.enter_graceful_shutdown = self._told.set, self._told.enter_graceful_shutdown
        self.List = self._told.List
        self._elsewhere = elsewhere
        self.asks = False

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        await self._ask(request.service)
        return await self._told.Check(request, context)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        asking = asyncio.ensure_future(self._keep_asking(request.service))
        try:
            await self._told.Watch(request, context)
        finally:
            asking.cancel()

    async def _ask(self, service: str) -> None:
        is_serving = self._elsewhere.get(service)
        if is_serving is None or not self.asks:
            return
        serving = await is_serving()
        # Draining may have begun meanwhile, and its NOT_SERVING is the last word.
        if self.asks:
            await self.set(service, _SERVING if serving else _NOT_SERVING)

    async def _keep_asking(self, service: str) -> None:
        while service in self._elsewhere:
            await self._ask(service)
            await asyncio.sleep(_WATCH_S)
