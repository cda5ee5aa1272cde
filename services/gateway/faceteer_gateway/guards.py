"""What every HTTP request passes before it is looked at, and every answer on its way out.

Hosts are checked because of DNS rebinding: a page elsewhere can point a name of its own at 127.0.0.1 and would then be
same-origin with this server. It cannot do so with an address.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
from collections.abc import Callable
from typing import Any

from faceteer_runtime.interceptors import REQUEST_ID_KEY
from faceteer_runtime.request import enter_request, new_request_id, sane_request_id

from faceteer_gateway.settings import GatewaySettings

# No inline script or style, nothing from elsewhere. Pictures of the page's own making are blob: and data: addresses.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "font-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "worker-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_SECURITY_HEADERS = [
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_REQUEST_ID = REQUEST_ID_KEY.encode()
_PRINTABLE = re.compile(rb"[ -~]*\Z")


class Guard:
    """Refuses hosts, headers and bodies that are not taken, sets the request id, and drops peers that stand still.

    Args:
        app: what is guarded.
        settings: the limits.
        host: the host of the address listened on, which is one that is answered.
    """

    def __init__(self, app: Any, settings: GatewaySettings, host: str) -> None:
        self._app = app
        self._hosts = settings.hosts | {host}
        self._any_host = "*" in settings.hosts
        self._max_header_bytes = settings.gateway_max_header_bytes
        self._max_body_bytes = settings.max_message_bytes
        self._stall_s = settings.gateway_stall_timeout_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        request_id = sane_request_id(headers.get(_REQUEST_ID, b"")) or new_request_id()
        enter_request(request_id, scope["path"])
        # Neither gRPC's metadata nor connectrpc's reader takes others, and no header of ours has them.
        readable = [(key, value) for key, value in scope["headers"] if _PRINTABLE.match(value)]
        identified = [(key, value) for key, value in readable if key != _REQUEST_ID]
        scope = {**scope, "headers": [*identified, (_REQUEST_ID, request_id.encode())]}
        secured = _with_headers(send, [*_SECURITY_HEADERS, (_REQUEST_ID, request_id.encode())])
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(secured, *refusal)
            return
        watch = _Watch(receive, secured, self._stall_s, scope.get("state", {}).get("abort"))
        try:
            await self._app(scope, watch.receive, watch.send)
        except Exception:
            if not watch.aborted:
                raise

    def _refusal(self, scope: Any, headers: dict[bytes, bytes]) -> tuple[int, str, str] | None:
        """Status, Connect's code and a sentence for a request that is not taken; None for one that is."""
        size = len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
        size += sum(len(key) + len(value) for key, value in scope["headers"])
        if size > self._max_header_bytes:
            return (
                431,
                "resource_exhausted",
                f"address and headers of {size} bytes are more than the {self._max_header_bytes} that are taken",
            )
        host = host_of(headers.get(b"host", b"").decode("latin-1"))
        if not self._any_host and host not in self._hosts and not _is_ip_address(host):
            return (
                421,
                "permission_denied",
                f"this server does not answer to the name {host[:100]!r}; whoever runs it can allow it with "
                "FACETEER_GATEWAY_HOSTS",
            )
        kind = headers.get(b"content-type", b"")
        if kind.startswith(b"application/grpc") and not kind.startswith(b"application/grpc-web"):
            return (
                415,
                "unimplemented",
                "this is the HTTP address, for Connect and gRPC-Web; gRPC has an address of its own (port 50050 by "
                "default)",
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return (
                413,
                "resource_exhausted",
                f"a message of {int(length)} bytes is larger than the {self._max_body_bytes} bytes that are taken",
            )
        return None


class _Watch:
    """receive() and send() that end a request whose caller stands still."""

    def __init__(self, receive: Any, send: Any, stall_s: float, abort: Callable[[], None] | None) -> None:
        self._receive = receive
        self._send = send
        self._stall_s = stall_s
        self._abort = abort
        self._body_done = False
        self.aborted = False

    async def receive(self) -> Any:
        if self._body_done:
            # Waits for the caller to leave, which may take as long as the answer does.
            return await self._receive()
        try:
            async with asyncio.timeout(self._stall_s):
                message = await self._receive()
        except TimeoutError:
            self._drop()
            return {"type": "http.disconnect"}
        self._body_done = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def send(self, message: Any) -> None:
        try:
            async with asyncio.timeout(self._stall_s) as limit:
                await self._send(message)
        except TimeoutError:
            if not limit.expired():
                raise
            self._drop()
            raise ConnectionAbortedError("the caller takes nothing") from None

    def _drop(self) -> None:
        self.aborted = True
        if self._abort is not None:
            self._abort()


def host_of(header: str) -> str:
    """The host of a Host header in lower case, without port and brackets."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_ip_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _with_headers(send: Any, headers: list[tuple[bytes, bytes]]) -> Any:
    async def send_with_headers(message: Any) -> None:
        if message["type"] == "http.response.start":
            given = list(message.get("headers", ()))
            names = {key.lower() for key, _ in given}
            message = {**message, "headers": [*given, *(pair for pair in headers if pair[0] not in names)]}
        await send(message)

    return send_with_headers


async def _refuse(send: Any, status: int, code: str, message: str) -> None:
    body = json.dumps({"code": code, "message": message}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        # What is left of the request is not read.
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
