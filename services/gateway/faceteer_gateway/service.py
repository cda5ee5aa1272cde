"""Wires the gateway together: the studio's address, the application, the HTTP server."""

from __future__ import annotations

import ipaddress
import logging

from faceteer_runtime.service import Resources, Service

from faceteer_gateway.application import application
from faceteer_gateway.http_server import HttpServer, bind
from faceteer_gateway.settings import GatewaySettings
from faceteer_gateway.upstream import Upstream

NAME = "gateway"

_log = logging.getLogger(__name__)


def build(resources: Resources) -> Service:
    """Serves HTTP at once, while models still load: callers are told that the server is starting.

    Raises:
        StartupError: the address cannot be had.
    """
    settings = GatewaySettings.from_other(resources.settings)
    if settings.gateway_listen == "none":
        return Service(NAME, grpc=False)
    listener = bind(settings.gateway_listen)
    upstream = Upstream(settings.gateway_studio_address)
    server = HttpServer(application(upstream, resources.metrics, settings), listener, settings)
    server.start()
    host, port = listener.getsockname()[:2]
    _log.info("serving HTTP at %s", http_address(host, port))
    if not _is_loopback(host) and settings.hosts == frozenset({"localhost"}):
        _log.info("only IP addresses and localhost are answered; FACETEER_GATEWAY_HOSTS allows other names")

    async def close() -> None:
        await server.close()
        await upstream.close()

    return Service(NAME, close=close, grpc=False)


def http_address(host: str, port: int) -> str:
    """Where a browser on this machine finds a server that listens there."""
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
