"""What a call costs over HTTP, by Connect in binary and in JSON, against the same call by gRPC.

The three take turns, so that what disturbs one disturbs all; every client keeps one connection of its own to the same
all-in-one server and reads its answers into messages (JSON: into dictionaries). Usage:
``python benchmarks/gateway_overhead.py [--bundle DIRECTORY] [--rounds N]``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop
from faceteer.v1 import edits_pb2, studio_pb2, studio_pb2_grpc
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "deploy"))
from local_server import STATE, http_address, temporary_server

CALLS = 5
SERVICE = "/faceteer.v1.StudioService"


class Connection:
    """HTTP/1.1 kept alive, no more than these calls need."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, address: str) -> Connection:
        host, _, port = address.removeprefix("http://").partition(":")
        # Large answers in one piece, as browsers read them.
        return cls(*await asyncio.open_connection(host, int(port), limit=1 << 24))

    async def post(self, path: str, kind: str, body: bytes) -> bytes:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        status = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status[:20]:
            raise SystemExit(f"{path}: {status.decode()}")
        answer = bytearray()
        while size := int(await self._reader.readline(), 16):
            answer += await self._reader.readexactly(size)
            await self._reader.readline()
        await self._reader.readline()
        return bytes(answer)


def unwrapped(frames: bytes) -> bytes:
    """The first message of a stream."""
    (size,) = struct.unpack(">I", frames[1:5])
    return frames[5 : 5 + size]


def wrapped(message: bytes) -> bytes:
    return struct.pack(">BI", 0, len(message)) + message


def three_ways(
    by_grpc: Callable[[Any], Awaitable[Any]], http: Connection, method: str, request: Message, kind: Any, stream: bool
) -> dict[str, Callable[[], Awaitable[object]]]:
    """The same call by gRPC, Connect in binary, and JSON."""
    path, of = f"{SERVICE}/{method}", "application/connect+" if stream else "application/"
    text = MessageToJson(request, indent=None)

    async def binary() -> object:
        data = request.SerializeToString()
        answer = await http.post(path, f"{of}proto", wrapped(data) if stream else data)
        return kind.FromString(unwrapped(answer) if stream else answer)

    async def as_json() -> object:
        data = text.encode()
        answer = await http.post(path, f"{of}json", wrapped(data) if stream else data)
        return json.loads(unwrapped(answer) if stream else answer)

    return {"gRPC": lambda: by_grpc(request), "Connect, binary": binary, "Connect, JSON": as_json}


async def measure(address: str, http: Connection, image: bytes, rounds: int) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        studio = studio_pb2_grpc.StudioServiceStub(channel)
        by_image = studio_pb2.OpenImageRequest(input=studio_pb2.ImageInput(image=image))
        opened = await studio.OpenImage(by_image)
        # A feature is edited once; the shipped bundle has fewer than 300.
        most = min(300, (await studio.GetStudio(studio_pb2.GetStudioRequest())).library.n_features)
        by_id = studio_pb2.ImageInput(embedding_id=opened.embedding.embedding_id)

        def report(count: int) -> studio_pb2.EditImageRequest:
            edits = [
                edits_pb2.Edit(
                    feature=edits_pb2.FeatureRef(index=index),
                    operation=edits_pb2.EDIT_OPERATION_SET,
                    unit=edits_pb2.EDIT_UNIT_RAW,
                    value=0.5,
                )
                for index in range(count)
            ]
            return studio_pb2.EditImageRequest(input=by_id, edits=edits, report_only=True)

        async def edited(request: Any) -> object:
            return await studio.EditImage(request).read()

        edit_kind = studio_pb2.EditImageResponse
        jobs = {
            "open a known picture": three_ways(
                studio.OpenImage, http, "OpenImage", by_image, studio_pb2.OpenImageResponse, False
            ),
            "report on 1 edit": three_ways(edited, http, "EditImage", report(1), edit_kind, True),
            f"report on {most} edits": three_ways(edited, http, "EditImage", report(most), edit_kind, True),
        }
        times: dict[tuple[str, str], list[float]] = {(job, way): [] for job, ways in jobs.items() for way in ways}
        for round_ in range(rounds + 1):
            for job, ways in jobs.items():
                for way, call in ways.items():
                    for _ in range(CALLS):
                        started = time.perf_counter()
                        await call()
                        if round_:  # the first round warms up
                            times[job, way].append(1e3 * (time.perf_counter() - started))
    for (job, way), values in times.items():
        p50, p95 = statistics.median(values), statistics.quantiles(values, n=20)[-1]
        base = statistics.median(times[job, "gRPC"])
        print(f"{job:<22} {way:<16} p50 {p50:6.2f} ms   p95 {p95:6.2f} ms   {p50 / base:5.2f} x gRPC")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("deploy/bundles/postcards"))
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    bundle = arguments.bundle.resolve()
    image = next((bundle / "examples").glob("*.png")).read_bytes()

    async def run(address: str) -> None:
        over_http = http_address(STATE / f"{address.rpartition(':')[2]}.log")
        if over_http is None:
            raise SystemExit("the server does not say where it serves HTTP")
        await measure(address, await Connection.open(over_http), image, arguments.rounds)

    with temporary_server(bundle) as address, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(address))


if __name__ == "__main__":
    main()
