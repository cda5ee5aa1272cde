"""The ASGI application: which address gets what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from faceteer_runtime.interceptors import ACCESS_KEY, REQUEST_ID_KEY
from faceteer_runtime.metrics import Metrics
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from faceteer_gateway.grpc_web_text import GrpcWebText
from faceteer_gateway.guards import Guard, host_of
from faceteer_gateway.page import PAGE, page_routes
from faceteer_gateway.pictures import Pictures
from faceteer_gateway.servicer import PATHS, Calls
from faceteer_gateway.settings import GatewaySettings
from faceteer_gateway.upstream import Upstream

# What Connect's and gRPC-Web's clients send and read.
_REQUEST_HEADERS = [
    "content-type",
    "connect-protocol-version",
    "connect-timeout-ms",
    "grpc-timeout",
    "x-grpc-web",
    "x-user-agent",
    REQUEST_ID_KEY,
    ACCESS_KEY,
]
_RESPONSE_HEADERS = ["grpc-status", "grpc-message", "grpc-status-details-bin", REQUEST_ID_KEY]


def application(upstream: Upstream, metrics: Metrics, settings: GatewaySettings, page: Path = PAGE) -> Any:
    """Calls at their own paths, /healthz, pictures, and the page, behind the guard."""
    calls = GrpcWebText(Calls(upstream, metrics, settings.max_message_bytes))

    async def healthz(request: Request) -> Response:
        parts = await upstream.health()
        whole = parts.pop("")
        return JSONResponse(
            {"status": whole, "parts": parts},
            200 if whole == "SERVING" else 503,
            headers={"cache-control": "no-store"},
        )

    app: Any = Starlette(
        routes=[
            *(Route(path, calls, methods=["POST"]) for path in PATHS),
            *(Route(path, _not_by_get, methods=["GET"]) for path in PATHS),
            Route("/healthz", healthz, methods=["GET"]),
            *Pictures(upstream).routes(),
            *page_routes(page),
        ],
        exception_handlers={HTTPException: _explain},
    )
    if settings.origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=_REQUEST_HEADERS,
            expose_headers=_RESPONSE_HEADERS,
            max_age=7200,
        )
    return Guard(app, settings, host_of(settings.gateway_listen))


async def _not_by_get(request: Request) -> Response:
    raise HTTPException(405)


async def _explain(request: Request, error: Exception) -> Response:
    """Wrong addresses and methods, in words."""
    assert isinstance(error, HTTPException)
    code, message = "unimplemented", error.detail
    if error.status_code == 404:
        message = f"nothing is at {request.url.path[:200]}; a call's address is /faceteer.v1.StudioService/OpenImage"
    elif error.status_code == 405 and request.url.path in PATHS:
        message = "send the call by POST, with content-type: application/json and the request as JSON"
    return JSONResponse({"code": code, "message": message}, error.status_code, headers=error.headers)
