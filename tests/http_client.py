"""HTTP/1.1 by hand over asyncio, for tests that must see every byte and every hang-up."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from dataclasses import dataclass
from typing import Any


@dataclass
class Reply:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def frames(self) -> list[tuple[int, bytes]]:
        """Flags and contents of Connect's and gRPC-Web's envelopes."""
        found, rest = [], self.body
        while rest:
            flags, size = struct.unpack(">BI", rest[:5])
            found.append((flags, rest[5 : 5 + size]))
            rest = rest[5 + size :]
        return found


def envelope(message: bytes) -> bytes:
    """A message as a stream holds it."""
    return struct.pack(">BI", 0, len(message)) + message


def detail_bytes(detail: dict[str, str]) -> bytes:
    """What an error's detail holds, of Connect's JSON."""
    return base64.b64decode(detail["value"] + "==")


def head(path: str, headers: dict[str, str], *, method: str = "POST", length: int | None = None) -> bytes:
    """A request's first lines."""
    lines = [
        f"{method} {path} HTTP/1.1",
        *(f"{key}: {value}" for key, value in {"host": "localhost", **headers}.items()),
    ]
    if length is not None:
        lines.append(f"content-length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def ask(
    port: int, path: str, body: bytes = b"", headers: dict[str, str] | None = None, method: str = "POST"
) -> Reply:
    """One request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head(path, headers or {}, method=method, length=len(body)) + body)
        return await read_reply(reader)
    finally:
        writer.close()


async def call(port: int, path: str, message: Any, headers: dict[str, str] | None = None) -> Reply:
    """A unary call by Connect with JSON."""
    return await ask(port, path, json.dumps(message).encode(), {"content-type": "application/json", **(headers or {})})


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in lines)}
    status = int(first.split()[1])
    if status in (204, 304):
        return Reply(status, headers, b"")
    if "content-length" in headers:
        return Reply(status, headers, await reader.readexactly(int(headers["content-length"])))
    body = b""
    while size := int(await reader.readline(), 16):
        body += await reader.readexactly(size)
        await reader.readline()
    return Reply(status, headers, body)
