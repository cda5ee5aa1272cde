"""uvicorn within a loop that somebody else runs, with a limit on the time that a request's head may take."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from faceteer_runtime.server import StartupError
from faceteer_runtime.settings import split_address
from uvicorn.protocols.http.h11_impl import H11Protocol

from faceteer_gateway.settings import GatewaySettings

# Browsers keep connections for the next call; between edits a person thinks.
_KEEP_ALIVE_S = 75


def bind(address: str) -> socket.socket:
    """A listening socket.

    Raises:
        StartupError: the address cannot be had.
    """
    host, port = split_address(address)
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise StartupError(
            f"cannot serve HTTP on {address}: {error.strerror}; choose another address with --gateway-listen "
            "(FACETEER_GATEWAY_LISTEN), or none to serve no HTTP"
        ) from None
    listener.setblocking(False)
    return listener


class HttpServer:
    """Serves from :meth:`start` to :meth:`close`.

    Args:
        app: the ASGI application.
        listener: bound already.
        settings: limits.
    """

    def __init__(self, app: Any, listener: socket.socket, settings: GatewaySettings) -> None:
        self._listener = listener
        self._server = _Server(
            uvicorn.Config(
                app,
                http=_protocol_with_timeout(settings.gateway_header_timeout_s),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
                limit_concurrency=settings.gateway_max_connections,
                h11_max_incomplete_event_size=settings.gateway_max_header_bytes,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Takes requests from now on; on the event loop."""
        self._serving = asyncio.ensure_future(self._server.serve([self._listener]))

    async def close(self) -> None:
        """Takes no more; lets running requests finish, for ``drain_seconds`` at most."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        self._listener.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process' own server handles signals."""
        yield


def _protocol_with_timeout(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, which waits for a request's head for ever, with a limit of ``seconds``."""

    class Protocol(H11Protocol):
        _head: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
            super().connection_made(transport)
            # Every request's scope gets a copy of this.
            self.app_state = {**self.app_state, "abort": transport.abort}
            self._head = self.loop.call_later(seconds, self._too_slow)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
                self._stop_clock()
            elif self._head is None:
                self._head = self.loop.call_later(seconds, self._too_slow)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_clock()
            super().connection_lost(exc)

        def _stop_clock(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

        def _too_slow(self) -> None:
            self._head = None
            self.transport.abort()

    return Protocol
