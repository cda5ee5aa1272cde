"""Pictures a second: the encoder service at saturation against the same model called in a loop at its best batch size.

Weights are random (timing does not care) unless a bundle is given. The service gets whole
JPEG files over gRPC and decodes them; the loop gets finished pixels, so what is measured is all that the service adds.
Both take turns within seconds of each other, and each ratio is one turn's, for a busy machine changes by the minute.
Processor time is told beside it, which other programs disturb less: what the model's thread spends on a picture in the
service and in the loop, and how much of the time that thread was at work. On a machine with a core to spare for
decoding, the service reaches about "busy" times "loop / service" of the loop; what this figure does not see is the
model's thread waiting for the interpreter's lock, which only the clock's ratio shows.

Usage: ``python benchmarks/encoder_throughput.py [--bundle DIRECTORY] [--pictures 64] [--side 320]``.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import grpc.aio
import numpy as np
import open_clip
import torch
import uvloop
from faceteer.v1 import encoder_pb2, encoder_pb2_grpc
from faceteer_encoder.model import load_encoder
from faceteer_runtime.bundle import seal
from PIL import Image
from safetensors.torch import save_file

BATCHES = (1, 2, 4, 8, 16, 32)
TURNS = 3
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
# ViT-S/32 at 224 px: large enough that the model is the work, small enough for two cores and a minute.
VISION = {"image_size": 224, "layers": 12, "width": 384, "head_width": 64, "patch_size": 32}


def random_bundle(directory: Path) -> Path:
    """A random ViT-S/32 alone in a bundle."""
    encoder = directory / "encoder"
    encoder.mkdir(parents=True)
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    model_cfg: dict[str, Any] = {"embed_dim": 512, "vision_cfg": VISION, "text_cfg": text}
    preprocess_cfg = {
        "size": 224,
        "mean": list(open_clip.OPENAI_DATASET_MEAN),
        "std": list(open_clip.OPENAI_DATASET_STD),
    }
    (encoder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    )
    torch.manual_seed(0)
    weights = open_clip.CLIP(**model_cfg).state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, encoder / "open_clip_model.safetensors")
    parts = {"encoder": {"kind": "open_clip", "embed_dim": 512}}
    seal(directory, {"name": "random", "description": "", "parts": parts, "licences": {}})
    return directory


def pictures(count: int, side: int) -> list[bytes]:
    """Different JPEG files of ``side`` pixels squared, of about a photograph's detail."""
    rng = np.random.default_rng(int(time.time()))
    files = []
    for _ in range(count):
        coarse = rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=88)
        files.append(buffer.getvalue())
    return files


def loop(encoder: Any, pixels: list[np.ndarray], batch: int) -> tuple[float, float]:
    """Pictures a second of the bare model, and processor seconds a picture."""
    began, spent = time.perf_counter(), time.thread_time()
    for start in range(0, len(pixels), batch):
        encoder.encode_images(pixels[start : start + batch])
    return len(pixels) / (time.perf_counter() - began), (time.thread_time() - spent) / len(pixels)


async def stream(stub: Any, files: list[bytes]) -> float:
    """Pictures a second through StreamEncodeImages."""

    async def requests() -> AsyncIterator[encoder_pb2.StreamEncodeImagesRequest]:
        for number, data in enumerate(files):
            yield encoder_pb2.StreamEncodeImagesRequest(sequence=number, image=data)

    began = time.perf_counter()
    answers = [answer async for answer in stub.StreamEncodeImages(requests())]
    assert all(answer.result.WhichOneof("result") == "embedding" and not answer.result.cached for answer in answers)
    return len(answers) / (time.perf_counter() - began)


async def unary(stub: Any, files: list[bytes], callers: int = 48) -> float:
    """Pictures a second of callers who each wait for one picture before they send the next."""
    waiting = iter(files)

    async def caller() -> None:
        for data in waiting:
            answer = await stub.EncodeImages(encoder_pb2.EncodeImagesRequest(images=[data]))
            assert answer.results[0].WhichOneof("result") == "embedding"

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return len(files) / (time.perf_counter() - began)


def model_metrics(address: str) -> tuple[float, float, float]:
    """Seconds in the model, batches and pictures so far, by the server's own metrics."""
    with urllib.request.urlopen(f"http://{address}/metrics") as page:
        lines = dict(line.rsplit(" ", 1) for line in page.read().decode().splitlines() if not line.startswith("#"))
    labels = '{batcher="encoder_images"}'
    names = ("faceteer_model_seconds_sum", "faceteer_batch_size_count", "faceteer_batch_size_sum")
    seconds, batches, items = (float(lines.get(name + labels, 0)) for name in names)
    return seconds, batches, items


def processor_seconds(process: int) -> dict[str, float]:
    """Processor seconds so far of each thread of a process, by /proc."""
    found = {}
    for thread in Path(f"/proc/{process}/task").iterdir():
        # Behind the name in brackets; user and system time are the twelfth and thirteenth values there.
        values = (thread / "stat").read_text().rpartition(")")[2].split()
        found[thread.name] = (int(values[11]) + int(values[12])) / TICKS_A_SECOND
    return found


async def measure(bundle: Path, process: int, address: str, metrics: str, count: int, side: int) -> None:
    torch.set_num_threads(1)
    encoder, preprocessor = load_encoder(bundle / "encoder")
    files = pictures(32, side)
    began = time.thread_time()
    sample = [preprocessor.pixels(data) for data in files]
    decoding = (time.thread_time() - began) / len(files)
    loop(encoder, sample[:8], 8)
    # By processor time, so that one disturbance does not choose the batch size.
    tries = {batch: loop(encoder, sample, batch) for batch in BATCHES}
    best = min(tries, key=lambda batch: tries[batch][1])
    print(
        "bare loop, processor ms a picture by batch size: "
        + "  ".join(f"{b}: {t[1] * 1e3:.1f}" for b, t in tries.items())
    )
    print(f"decoding one {side} x {side} JPEG: {decoding * 1e3:.1f} ms of processor time")
    ratios: dict[str, list[tuple[float, float, float]]] = {"stream": [], "48 callers": []}
    async with grpc.aio.insecure_channel(address) as channel:
        stub = encoder_pb2_grpc.EncoderServiceStub(channel)
        await stream(stub, pictures(32, side))
        for _ in range(TURNS):
            for name, drive in (("stream", stream), ("48 callers", unary)):
                files = pictures(count, side)
                before, cost_before = loop(encoder, sample, best)
                was, spent = model_metrics(metrics), processor_seconds(process)
                service = await drive(stub, files)
                threads = processor_seconds(process)
                seconds, batches, items = (now - then for now, then in zip(model_metrics(metrics), was, strict=True))
                after, cost_after = loop(encoder, sample, best)
                # The loop's time for a picture is what averages over the two, not its rate.
                bare, cost = 2 / (1 / before + 1 / after), (cost_before + cost_after) / 2
                used = [total - spent.get(thread, 0.0) for thread, total in threads.items()]
                model, busy = max(used) / items, seconds * service / items
                ratios[name].append((service / bare, service * (1 / bare + decoding), busy * cost / model))
                print(
                    f"{name:10}  service {service:6.1f}/s   bare loop at {best} {bare:6.1f}/s   {service / bare:.3f} x"
                    f"   model busy {busy:.0%}, {items / batches:.1f} a batch"
                    f"   processor ms a picture: loop {cost * 1e3:.1f}, service's model {model * 1e3:.1f},"
                    f" its other threads {(sum(used) - max(used)) / items * 1e3:.1f}"
                )
    for name, found in ratios.items():
        clock, decoded, undisturbed = (statistics.median(column) for column in zip(*found, strict=True))
        print(
            f"{name:10}  median {clock:.3f} x the bare loop, {decoded:.3f} x with its decoding;"
            f" by processor time {undisturbed:.3f} x the bare loop"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--side", type=int, default=320)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bundle = arguments.bundle or random_bundle(Path(directory) / "random")
        command = [sys.executable, "-c", SERVER, str(bundle)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address, metrics = server.stdout.readline().split()
            uvloop.run(measure(bundle, server.pid, address, metrics, arguments.pictures, arguments.side))
        finally:
            server.kill()
            server.wait()


SERVER = """
import asyncio, sys, uvloop
from faceteer_encoder.service import build
from faceteer_encoder.settings import EncoderSettings
from faceteer_runtime.server import start
async def serve():
    settings = EncoderSettings(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", bundle=sys.argv[1])
    server = await start(settings, build)
    print(server.address, f"127.0.0.1:{server.metrics_port}", flush=True)
    await asyncio.Event().wait()
uvloop.run(serve())
"""


if __name__ == "__main__":
    main()
