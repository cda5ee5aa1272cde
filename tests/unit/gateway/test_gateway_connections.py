"""Connections that hang up, stall or send too much."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import SimpleNamespace

import pytest
from faceteer.v1 import studio_pb2
from http_client import ask, call, envelope, head, read_reply

OPEN = "/faceteer.v1.StudioService/OpenImage"
EDIT = "/faceteer.v1.StudioService/EditImage"
JSON = {"content-type": "application/json"}
Gateway = Callable[..., AbstractAsyncContextManager[SimpleNamespace]]


def asking(data: bytes) -> bytes:
    return studio_pb2.OpenImageRequest(input=studio_pb2.ImageInput(image=data)).SerializeToString()


@pytest.mark.parametrize("path", [OPEN, EDIT])
async def test_a_caller_who_leaves_ends_the_work(world: SimpleNamespace, path: str) -> None:
    body = asking(b"wait") if path == OPEN else envelope(asking(b"wait"))
    kind = "application/proto" if path == OPEN else "application/connect+proto"
    _, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(head(path, {"content-type": kind}, length=len(body)) + body)
    await asyncio.wait_for(world.studio.begun.wait(), 10)
    writer.close()
    await asyncio.wait_for(world.studio.cancelled.wait(), 10)


async def test_a_reader_that_stalls_costs_little_and_is_dropped(gateway: Gateway) -> None:
    async with gateway(gateway_stall_timeout_s=1.5) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port, limit=1 << 16)
        body = envelope(asking(b"flood"))
        writer.write(head(EDIT, {"content-type": "application/grpc-web+proto"}, length=len(body)) + body)
        await asyncio.wait_for(running.studio.begun.wait(), 10)
        await asyncio.sleep(1.0)
        # Of 10 GB, what buffers of sockets and of gRPC hold.
        sent = running.studio.sent
        assert sent < 40
        await asyncio.sleep(2.0)
        assert running.studio.sent <= sent + 2
        # What is in the buffers still comes; then the connection breaks instead of going on.
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(100 << 20), 10)
        writer.close()
        assert (await call(running.port, OPEN, {})).status == 200


async def test_a_body_over_the_limit_is_refused_unread(gateway: Gateway) -> None:
    async with gateway(max_message_bytes=2000) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(head(OPEN, JSON, length=2001))
        reply = await read_reply(reader)
        assert (reply.status, reply.json()["code"]) == (413, "resource_exhausted")
        writer.close()
        # Without a length, it is counted while it is read.
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        chunk = b"7d0\r\n" + b" " * 2000 + b"\r\n"
        writer.write(head(OPEN, {**JSON, "transfer-encoding": "chunked"}) + chunk + chunk + b"0\r\n\r\n")
        reply = await read_reply(reader)
        assert (reply.status, reply.json()["code"]) == (429, "resource_exhausted")
        assert reply.json()["details"][0]["type"] == "google.rpc.ErrorInfo"
        writer.close()
        kind = {"content-type": "application/connect+proto", "transfer-encoding": "chunked"}
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        lie = b"\x00\x7f\xff\xff\xff"
        writer.write(head(EDIT, kind) + b"5\r\n" + lie + b"\r\n0\r\n\r\n")
        reply = await read_reply(reader)
        assert json.loads(reply.frames()[-1][1])["error"]["code"] == "resource_exhausted"
        writer.close()
        assert running.studio.seen is None


async def test_headers_over_the_limit_are_refused(gateway: Gateway) -> None:
    async with gateway(gateway_max_header_bytes=4096) as running:
        reply = await ask(running.port, "/healthz", headers={"x-long": "a" * 5000}, method="GET")
        assert reply.status in (400, 431)
        assert (await ask(running.port, "/healthz?" + "a" * 5000, method="GET")).status in (400, 431)


async def test_headers_that_do_not_come_close_the_connection(gateway: Gateway) -> None:
    async with gateway(gateway_header_timeout_s=0.4) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        # A byte now and then does not help.
        sent = 0
        while not (reader.at_eof() or reader.exception()):
            writer.write(b"GET /"[sent : sent + 1] or b"a")
            sent += 1
            await asyncio.sleep(0.05)
            assert sent < 100
        writer.close()
        # The second request of a connection has the same limit, and waiting between two has not.
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(head("/healthz", {}, method="GET"))
        assert (await read_reply(reader)).status == 200
        await asyncio.sleep(0.6)
        writer.write(head("/healthz", {}, method="GET"))
        assert (await read_reply(reader)).status == 200
        writer.write(b"GET /heal")
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await asyncio.wait_for(reader.readexactly(1), 5)
        writer.close()


async def test_a_body_that_stalls_closes_the_connection(gateway: Gateway) -> None:
    async with gateway(gateway_stall_timeout_s=0.4) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(head(OPEN, JSON, length=100) + b"{")
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await asyncio.wait_for(reader.readexactly(1), 5)
        writer.close()
        # An answer that takes longer than that is waited for.
        slow = await call(running.port, OPEN, {"input": {"image": "d2FpdA=="}}, {"connect-timeout-ms": "900"})
        assert slow.json()["code"] == "deadline_exceeded"


async def test_connections_are_bounded(gateway: Gateway) -> None:
    async with gateway(gateway_max_connections=2) as running:
        connections = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(2)]
        await asyncio.sleep(0.1)
        assert (await ask(running.port, "/healthz", method="GET")).status == 503
        for _, writer in connections:
            writer.close()


async def test_stopping_lets_a_call_finish_that_is_nearly_done(gateway: Gateway) -> None:
    async with gateway() as running:
        body = envelope(asking(b"wait"))
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(head(EDIT, {"content-type": "application/connect+proto"}, length=len(body)) + body)
        await asyncio.wait_for(running.studio.begun.wait(), 10)
        await asyncio.wait_for(running.server.stop(0.2), 10)
        # A caller is told, in the stream's own words, and not just cut off.
        reply = await asyncio.wait_for(read_reply(reader), 5)
        assert json.loads(reply.frames()[-1][1])["error"]["code"] in ("unavailable", "canceled")
        writer.close()
