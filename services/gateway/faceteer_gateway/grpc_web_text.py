"""gRPC-Web's text form: its binary form in base64, which clients for old browsers speak."""

from __future__ import annotations

import base64
import binascii
from typing import Any


class GrpcWebText:
    """Lets an application that knows the binary form take and give the text form too."""

    _TEXT, _BINARY = b"application/grpc-web-text", b"application/grpc-web"

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        if not headers.get(b"content-type", b"").startswith(self._TEXT):
            await self._app(scope, receive, send)
            return
        rest = b""

        async def receive_binary() -> Any:
            nonlocal rest
            message = await receive()
            if message["type"] != "http.request":
                return message
            text = rest + message.get("body", b"")
            whole = len(text) // 4 * 4 if message.get("more_body", False) else len(text)
            text, rest = text[:whole], text[whole:]
            try:
                # Each frame may have been encoded, and so padded, by itself.
                body = b"".join(base64.b64decode(part, validate=True) for part in _padded_parts(text))
            except binascii.Error:
                # Nothing of this shape is a frame, so that the application says what is wrong.
                body = b"\xff" * 5
            return {**message, "body": body}

        async def send_text(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    (key, value.replace(self._BINARY, self._TEXT) if key == b"content-type" else value)
                    for key, value in message["headers"]
                ]
            elif message["type"] == "http.response.body":
                message = {**message, "body": base64.b64encode(message.get("body", b""))}
            await send(message)

        kind = headers[b"content-type"].replace(self._TEXT, self._BINARY)
        replaced = [(k, kind if k == b"content-type" else v) for k, v in scope["headers"]]
        await self._app({**scope, "headers": replaced}, receive_binary, send_text)


def _padded_parts(text: bytes) -> list[bytes]:
    """Base64 that was encoded piece by piece, cut after each piece's padding."""
    parts, start = [], 0
    while (end := text.find(b"=", start)) >= 0:
        end += 1
        while end < len(text) and text[end : end + 1] == b"=":
            end += 1
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]
