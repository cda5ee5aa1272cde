"""What an edit costs: EditEmbeds of a known embedding with 1 to 300 edits against an empty call of the same server.

Requests are serialised before, and answers left unparsed, so that what is compared is the
server and the way to it. The calls take turns, so that what disturbs one disturbs all.

Usage: ``python benchmarks/edit_latency.py [--large]``; ``--large`` takes 163,840 features of 1,280 float16 values, the
published SAE's shape, instead of the tiny bundle's (2 GB of memory, 1 GB of temporary disk).
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc.aio
import numpy as np
import torch
import uvloop
from faceteer.v1 import edits_pb2, sae_pb2, tensor_pb2
from faceteer_runtime.bundle import seal
from faceteer_runtime.server import start
from faceteer_sae.service import build
from faceteer_sae.settings import SaeSettings
from faceteer_sae.statistics import FeatureStatistics, save_statistics
from faceteer_sae.weights import SaeWeights, write_weights

SHAPES = {"small": (64, 1024, 32, torch.float32), "large": (1280, 163_840, 64, torch.float16)}
EDITS = (1, 10, 100, 300)
ROUNDS, CALLS = 150, 10
SERVICE = "/faceteer.v1.SaeService/"


def write_bundle(directory: Path, shape: str) -> None:
    """A random TopK SAE with statistics, alone in a bundle."""
    d, n, k, dtype = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    W = torch.empty(n, d, dtype=dtype)
    for rows in W.split(8192):
        rows.copy_(torch.nn.functional.normalize(torch.randn(len(rows), d, generator=generator), dim=1))
    sae = SaeWeights("topk", W, torch.zeros(n), W, torch.zeros(d), apply_b_dec_to_input=False, k=k)
    write_weights(directory / "sae", sae, str(dtype).removeprefix("torch."), layout="saelens")
    none = np.zeros(0, np.int32)
    shares, p99 = np.full(n, k / n, np.float32), np.full(n, 4, np.float32)
    save_statistics(directory / "sae", FeatureStatistics(shares, p99, np.zeros(n + 1, np.int64), none))
    seal(directory, {"name": "bench", "parts": {"sae": {"kind": "sae", "encoder_revision": "0123456789abcdef"}}})


async def serve(directory: str) -> None:
    running = await start(SaeSettings(listen="127.0.0.1:0", bundle=Path(directory)), build)
    print(running.address, flush=True)
    await asyncio.Event().wait()


def source(rng: np.random.Generator, d: int) -> tensor_pb2.EmbedsInput:
    """A random embedding of norm 40."""
    x = rng.standard_normal(d)
    x = (x * 40 / np.linalg.norm(x)).astype("<f4")
    return tensor_pb2.EmbedsInput(embeds=tensor_pb2.Tensor(element_type=1, shape=[d], data=x.tobytes()))


async def ask(address: str, shape: str) -> None:
    d, n, _, _ = SHAPES[shape]
    rng = np.random.default_rng(0)
    async with grpc.aio.insecure_channel(address) as channel:
        encode = channel.unary_unary(f"{SERVICE}EncodeFeatures")
        cold = []
        for _ in range(10):
            request = sae_pb2.EncodeFeaturesRequest(inputs=[source(rng, d)]).SerializeToString()
            began = time.perf_counter()
            answer = await encode(request)
            cold.append(time.perf_counter() - began)
        found = sae_pb2.EncodeFeaturesResponse.FromString(answer).results[0].encoding
        known = tensor_pb2.EmbedsInput(embedding_id=found.embedding_id)
        requests = {"empty call (GetSae)": ("GetSae", b"")}
        for edits in EDITS:
            message = sae_pb2.EditEmbedsRequest(input=known)
            for index in rng.choice(n, edits, replace=False):
                message.edits.add(
                    feature=edits_pb2.FeatureRef(index=int(index)),
                    operation=edits_pb2.EDIT_OPERATION_SET,
                    value=float(rng.uniform(0, 2)),
                )
            requests[f"{edits:3} edits"] = ("EditEmbeds", message.SerializeToString())
        calls = {name: (channel.unary_unary(SERVICE + method), data) for name, (method, data) in requests.items()}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for round_ in range(ROUNDS + 10):
            for name, (call, data) in calls.items():
                for _ in range(CALLS):
                    began = time.perf_counter()
                    await call(data)
                    if round_ >= 10:
                        seconds[name].append(time.perf_counter() - began)
    d_sae = f"d_in {d:,}, d_sae {n:,}, {SHAPES[shape][3]}".replace("torch.", "")
    print(f"{d_sae}; a cold encode takes {statistics.median(cold) * 1e3:.1f} ms (p50 of {len(cold)})")
    empty = statistics.median(seconds["empty call (GetSae)"])
    for name, samples in seconds.items():
        p50, p99 = statistics.median(samples), sorted(samples)[int(0.99 * len(samples))]
        print(f"{name:20} p50 {p50 * 1e6:6.0f} µs   p99 {p99 * 1e6:6.0f} µs   {p50 / empty:.2f} x empty")


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        uvloop.run(serve(sys.argv[2]))
        return
    shape = "large" if "--large" in sys.argv else "small"
    with tempfile.TemporaryDirectory() as directory:
        write_bundle(Path(directory), shape)
        command = [sys.executable, __file__, "serve", directory]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            uvloop.run(ask(server.stdout.readline().strip(), shape))
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
