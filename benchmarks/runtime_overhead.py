"""What the runtime adds: an empty gRPC call through its interceptors against a bare grpc.aio server, and cache hits.

Both servers live in one process and are asked in turns by one client, so that the scheduler
treats them alike: in processes of their own, which core each one happens to share moves p50 by 40 %.

Usage: ``python benchmarks/runtime_overhead.py``.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from typing import Any

import grpc
import grpc.aio
import numpy as np
import uvloop
from faceteer_runtime.cache import Cache
from faceteer_runtime.cache_keys import cache_key
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.server import start
from faceteer_runtime.service import Service
from faceteer_runtime.settings import ServiceSettings

METHOD = "/bench.Empty/Call"
# Short turns: what disturbs one server for a moment disturbs the other as well.
ROUNDS, CALLS = 400, 20


async def answer(request: bytes, context: Any) -> bytes:
    return b""


def register(server: grpc.aio.Server) -> None:
    handlers = {"Call": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Empty", handlers),))


async def serve() -> None:
    class Settings(ServiceSettings):
        needs_bundle = False

    bare = grpc.aio.server()
    port = bare.add_insecure_port("127.0.0.1:0")
    register(bare)
    await bare.start()
    running = await start(Settings(listen="127.0.0.1:0"), lambda _: Service("bench.Empty", register))
    print(port, running.port, flush=True)
    await asyncio.Event().wait()


async def ask(ports: dict[str, int]) -> None:
    channels = {name: grpc.aio.insecure_channel(f"127.0.0.1:{port}") for name, port in ports.items()}
    calls = {name: channel.unary_unary(METHOD) for name, channel in channels.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ports}
    for call in calls.values():
        for _ in range(20 * CALLS):
            await call(b"")
    for _ in range(ROUNDS):
        for name, call in calls.items():
            for _ in range(CALLS):
                began = time.perf_counter()
                await call(b"")
                seconds[name].append(time.perf_counter() - began)
    for channel in channels.values():
        await channel.close()
    bare = statistics.median(seconds["bare"])
    for name, samples in seconds.items():
        p50, p99 = statistics.median(samples), sorted(samples)[int(0.99 * len(samples))]
        print(f"empty call, {name:8} p50 {p50 * 1e6:6.0f} µs   p99 {p99 * 1e6:6.0f} µs   {p50 / bare:.3f} x bare")


async def hit() -> None:
    cache = Cache(64 << 20, Metrics())
    keys = [cache_key("embeds", "bench", str(n).encode()) for n in range(64)]
    for key in keys:
        cache.put(key, {"embeds": np.zeros(1280, np.float32)})
    for keys_each, rounds in ((1, 20_000), (32, 2_000)):
        began = time.perf_counter()
        for _ in range(rounds):
            if keys_each == 1:
                await cache.get(keys[0])
            else:
                await cache.get_many(keys[:keys_each])
        microseconds = (time.perf_counter() - began) / rounds * 1e6
        print(f"cache hit in memory, {keys_each:2} keys of 1,280 floats   {microseconds:.1f} µs")


def main() -> None:
    if sys.argv[1:] == ["serve"]:
        uvloop.run(serve())
        return
    server = subprocess.Popen([sys.executable, __file__, "serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        bare, runtime = map(int, server.stdout.readline().split())
        uvloop.run(ask({"bare": bare, "runtime": runtime}))
        uvloop.run(hit())
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
