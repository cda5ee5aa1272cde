"""The generator under load: 16 requests at once through the service, against KandinskyV22Pipeline one after another.

It starts the service's own command and asks over gRPC on the loopback, while
the pipeline runs in this process. They take turns, with the same number of threads, on the same bundle, seeds and
settings; no result comes from a cache. Processor time is measured too: other work on the machine hardly moves it.

Usage: ``python benchmarks/generator_load.py --bundle deploy/bundles/postcards``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import psutil
import torch
from diffusers import KandinskyV22Pipeline
from faceteer.v1 import generator_pb2, generator_pb2_grpc, tensor_pb2
from faceteer_runtime.bundle import Bundle
from faceteer_runtime.healthcheck import check
from PIL import Image
from safetensors.torch import load_file


class Baseline:
    """diffusers as its documentation shows it, on the bundle's files, in the precision that the service uses."""

    def __init__(self, bundle: Bundle) -> None:
        part = bundle.part("generator")
        self.pipe = KandinskyV22Pipeline.from_pretrained(part.path, dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        self.negative = load_file(part.path / "negative_embeds.safetensors")["negative_image_embeds"].float()
        self.facts = part.facts

    def draw(self, embeds: np.ndarray, seed: int) -> tuple[np.ndarray, bytes]:
        """Pixels and a PNG file of one request."""
        width, height = self.facts["sizes"][0]
        image = self.pipe(
            torch.tensor(embeds)[None],
            self.negative,
            width=width,
            height=height,
            num_inference_steps=self.facts["steps"],
            guidance_scale=self.facts["guidance_scale"],
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return np.asarray(image), buffer.getvalue()


@contextlib.contextmanager
def running_service(bundle: Path, threads: int) -> Iterator[tuple[str, int]]:
    """``python -m faceteer_generator`` on a free port; its address and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = ("--listen", address, "--bundle", str(bundle), "--threads", str(threads), "--log-level", "warning")
    process = subprocess.Popen(
        [sys.executable, "-m", "faceteer_generator", *flags], env={**os.environ, "OMP_NUM_THREADS": str(threads)}
    )
    try:
        while check(address) != "SERVING":
            if process.poll() is not None:
                raise SystemExit("the service ended at its start")
            time.sleep(0.1)
        yield address, process.pid
    finally:
        process.terminate()
        process.wait()


class Service:
    """The service through a stub."""

    def __init__(self, address: str) -> None:
        self.stub: Any = generator_pb2_grpc.GeneratorServiceStub(grpc.aio.insecure_channel(address))

    async def draw(self, embeds: np.ndarray, seed: int) -> bytes:
        """A PNG file of one request."""
        tensor = tensor_pb2.Tensor(
            element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32, shape=embeds.shape, data=embeds.astype("<f4").tobytes()
        )
        request = generator_pb2.GenerateRequest(
            input=tensor_pb2.EmbedsInput(embeds=tensor), settings=generator_pb2.GenerationSettings(seeds=[seed])
        )
        async for event in self.stub.Generate(request):
            if event.WhichOneof("event") == "image":
                assert not event.image.cached
                data = bytes(event.image.data)
        return data

    async def draw_at_once(self, requests: list[tuple[np.ndarray, int]]) -> list[float]:
        """Seconds from the common start until each request is done."""
        started = time.perf_counter()

        async def wait(embeds: np.ndarray, seed: int) -> float:
            await self.draw(embeds, seed)
            return time.perf_counter() - started

        return list(await asyncio.gather(*(wait(*request) for request in requests)))


def draw_in_turn(baseline: Baseline, requests: list[tuple[np.ndarray, int]]) -> list[float]:
    """Seconds from the common start until each request is done."""
    started = time.perf_counter()
    waits = []
    for embeds, seed in requests:
        baseline.draw(embeds, seed)
        waits.append(time.perf_counter() - started)
    return waits


def processor_s(pid: int | None = None) -> float:
    """Processor seconds that a process has used, this one by default."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def summary(rounds: list[list[float]]) -> dict[str, float]:
    """Medians over rounds: pictures a second, p50 and p95 wait in seconds."""
    return {
        "throughput": statistics.median(len(waits) / max(waits) for waits in rounds),
        "p50": statistics.median(float(np.percentile(waits, 50)) for waits in rounds),
        "p95": statistics.median(float(np.percentile(waits, 95)) for waits in rounds),
    }


async def measure(arguments: argparse.Namespace, address: str, pid: int) -> None:
    torch.set_num_threads(arguments.threads)
    bundle = Bundle.open(arguments.bundle)
    facts = bundle.part("generator").facts
    service, baseline = Service(address), Baseline(bundle)
    rng = np.random.default_rng(0)
    dimensions = baseline.negative.shape[1]
    scale = float(baseline.negative.norm()) / dimensions**0.5

    def requests(count: int) -> list[tuple[np.ndarray, int]]:
        # New ones each time: the service keeps what it has drawn.
        embeds = (scale * rng.standard_normal((count, dimensions))).astype(np.float32)
        return [(row, int(rng.integers(2**32))) for row in embeds]

    (warm,) = requests(1)
    pixels, _ = baseline.draw(*warm)
    ours = np.asarray(Image.open(io.BytesIO(await service.draw(*warm))))
    difference = int(np.abs(ours.astype(int) - pixels.astype(int)).max())
    alone: dict[str, list[float]] = {"pipeline": [], "service": []}
    together: dict[str, list[list[float]]] = {"pipeline": [], "service": []}
    processor: dict[str, list[float]] = {"pipeline": [], "service": []}
    for _ in range(arguments.rounds):
        for request in requests(4):
            started = time.perf_counter()
            baseline.draw(*request)
            turned = time.perf_counter()
            await service.draw(*request)
            alone["pipeline"].append(turned - started)
            alone["service"].append(time.perf_counter() - turned)
        burst = requests(arguments.requests)
        before = processor_s(), processor_s(pid)
        together["pipeline"].append(draw_in_turn(baseline, burst))
        between = processor_s()
        together["service"].append(await service.draw_at_once(burst))
        processor["pipeline"].append((between - before[0]) / len(burst))
        processor["service"].append((processor_s(pid) - before[1]) / len(burst))

    single = {name: statistics.median(seconds) for name, seconds in alone.items()}
    burst_of = {name: summary(rounds) for name, rounds in together.items()}
    print(
        f"{bundle.name}: {facts['sizes'][0]}, {facts['steps']} steps, guidance {facts['guidance_scale']}, "
        f"{arguments.threads} thread(s), median of {arguments.rounds} rounds"
    )
    print(f"same request, largest difference of a pixel: {difference} of 255")
    print(f"{'':40}{'pipeline':>10}{'service':>10}{'ratio':>8}")
    rows = [
        ("one picture alone, s", single["pipeline"], single["service"]),
        *(
            (f"{arguments.requests} at once, {name}", burst_of["pipeline"][key], burst_of["service"][key])
            for name, key in (("pictures/s", "throughput"), ("p50 wait, s", "p50"), ("p95 wait, s", "p95"))
        ),
        (
            f"{arguments.requests} at once, processor s a picture",
            statistics.median(processor["pipeline"]),
            statistics.median(processor["service"]),
        ),
    ]
    for name, theirs, own in rows:
        print(f"{name:40}{theirs:>10.3f}{own:>10.3f}{own / theirs:>8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("deploy/bundles/postcards"))
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads, of both")
    arguments = parser.parse_args()
    with running_service(arguments.bundle, arguments.threads) as (address, pid):
        asyncio.run(measure(arguments, address, pid))


if __name__ == "__main__":
    main()
