"""A bundle with nothing but an SAE, and a real server on it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch
from faceteer.v1 import sae_pb2_grpc
from faceteer_runtime.bundle import seal
from faceteer_runtime.server import RunningServer, start
from faceteer_sae.service import build
from faceteer_sae.settings import SaeSettings
from hypothesis import settings
from tiny_bundle import EMBED_DIM, _write_sae

sys.path.insert(0, str(Path(__file__).parent))
# A busy machine is not a failing test.
settings.register_profile("faceteer", deadline=None)
settings.load_profile("faceteer")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus() -> torch.Tensor:
    """Embeddings to which the tiny SAE is fitted, float32 [256, d], of norms like a real encoder's."""
    generator = torch.Generator().manual_seed(5)
    return 8 * torch.randn(256, EMBED_DIM, generator=generator) + 2


@pytest.fixture(scope="session")
def sae_bundle(tmp_path_factory: pytest.TempPathFactory, corpus: torch.Tensor) -> Path:
    directory = tmp_path_factory.mktemp("sae-bundle")
    _write_sae(directory / "sae", corpus)
    seal(directory, {"name": "only-an-sae", "parts": {"sae": {"kind": "sae", "encoder_revision": "0123456789abcdef"}}})
    return directory


class Serving:
    """A running server and a stub on it."""

    def __init__(self, server: RunningServer, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.cache = server.resources.cache
        self.stub: Any = sae_pb2_grpc.SaeServiceStub(channel)


@pytest.fixture
async def serve(sae_bundle: Path) -> AsyncIterator[Callable[..., Any]]:
    """Starts a server with the settings given; everything is stopped after the test."""
    started: list[tuple[RunningServer, grpc.aio.Channel]] = []

    async def start_one(**fields: Any) -> Serving:
        server = await start(SaeSettings(**({"listen": "127.0.0.1:0", "bundle": sae_bundle} | fields)), build)
        channel = grpc.aio.insecure_channel(server.address)
        started.append((server, channel))
        return Serving(server, channel)

    yield start_one
    for server, channel in started:
        await channel.close()
        await server.stop(0.0)
