"""What opening a picture seen before costs, and an edit's report: against an empty call of the same server.

The calls take turns, so that what disturbs one disturbs all; the client is raw
gRPC on asyncio, over loopback. Usage: ``python benchmarks/open_latency.py [--bundle DIRECTORY]``.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc.aio
import uvloop
from faceteer.v1 import edits_pb2, library_pb2, library_pb2_grpc, studio_pb2, studio_pb2_grpc

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "deploy"))
from local_server import temporary_server

ROUNDS, CALLS = 60, 10


async def measure(address: str, image: bytes) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        studio = studio_pb2_grpc.StudioServiceStub(channel)
        library = library_pb2_grpc.LibraryServiceStub(channel)
        by_image = studio_pb2.OpenImageRequest(input=studio_pb2.ImageInput(image=image))
        opened = await studio.OpenImage(by_image)
        by_id = studio_pb2.ImageInput(embedding_id=opened.embedding.embedding_id)
        edit = edits_pb2.Edit(
            feature=edits_pb2.FeatureRef(index=opened.features[0].index),
            operation=edits_pb2.EDIT_OPERATION_SET,
            value=0.5,
        )
        report = studio_pb2.EditImageRequest(input=by_id, edits=[edit], report_only=True, skip_measuring=True)
        empty = studio_pb2.GetStudioRequest()
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            # Answered from memory: as empty as this service's calls get.
            "empty call": lambda: studio.GetStudio(empty),
            "open a known picture, by its bytes": lambda: studio.OpenImage(by_image),
            "open a known picture, by its id": lambda: studio.OpenImage(studio_pb2.OpenImageRequest(input=by_id)),
            "edit one feature, report only": lambda: studio.EditImage(report).read(),
            "one feature of the library": lambda: library.BatchGetFeatures(
                library_pb2.BatchGetFeaturesRequest(features=[edits_pb2.FeatureRef(index=0)])
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for round_ in range(ROUNDS):
            for name, call in calls.items():
                for _ in range(CALLS):
                    started = time.perf_counter()
                    await call()
                    if round_:  # the first round warms up
                        times[name].append(1e6 * (time.perf_counter() - started))
    base = statistics.median(times["empty call"])
    for name, values in times.items():
        p50, p95 = statistics.median(values), statistics.quantiles(values, n=20)[-1]
        print(f"{name:<38} p50 {p50:7.0f} µs   p95 {p95:7.0f} µs   {p50 / base:5.2f} x empty")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("deploy/bundles/postcards"))
    bundle = parser.parse_args().bundle.resolve()
    image = next((bundle / "examples").glob("*.png")).read_bytes()
    with temporary_server(bundle) as address, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure(address, image))


if __name__ == "__main__":
    main()
