"""A tiny random decoder, alone in a bundle of its own, and a real server on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import faceteer_generator.service
import grpc.aio
import pytest
import torch
from faceteer.v1 import generator_pb2_grpc
from faceteer_generator.denoise import Denoiser
from faceteer_generator.engine import Engine
from faceteer_generator.kandinsky import KandinskyDecoder
from faceteer_generator.model import load_decoder
from faceteer_generator.service import build
from faceteer_generator.settings import GeneratorSettings
from faceteer_runtime.bundle import seal
from faceteer_runtime.server import RunningServer, start
from tiny_bundle import EMBED_DIM, _write_generator


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def generator_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with nothing but a generator part."""
    directory = tmp_path_factory.mktemp("generator-bundle")
    _write_generator(directory / "generator", torch.full((1, EMBED_DIM), 0.5))
    facts = {
        "kind": "kandinsky-2-2",
        "encoder_revision": "0123456789abcdef",
        "sizes": [[64, 64], [128, 64]],
        "steps": 4,
        "guidance_scale": 2.0,
        "scheduler": "ddim",
    }
    seal(directory, {"name": "only-a-generator", "parts": {"generator": facts}})
    return directory


@pytest.fixture(scope="session")
def decoder(generator_bundle: Path) -> KandinskyDecoder:
    return load_decoder(generator_bundle / "generator")


@pytest.fixture
def denoiser(decoder: KandinskyDecoder) -> Denoiser:
    return Denoiser(decoder)


class Serving:
    """A running server and a stub on it; ``engine`` is reached only to see whether it has become idle."""

    def __init__(self, server: RunningServer, channel: grpc.aio.Channel, engine: Engine) -> None:
        self.server, self.engine = server, engine
        self.stub: Any = generator_pb2_grpc.GeneratorServiceStub(channel)


@pytest.fixture
async def serve(generator_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Any]]:
    """Starts a server with the settings given; everything is stopped after the test."""
    started: list[tuple[RunningServer, grpc.aio.Channel]] = []
    engines: list[Engine] = []

    class Seen(Engine):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            engines.append(self)

    monkeypatch.setattr(faceteer_generator.service, "Engine", Seen)

    async def start_one(**settings: Any) -> Serving:
        fields = {"listen": "127.0.0.1:0", "bundle": generator_bundle, **settings}
        server = await start(GeneratorSettings(**fields), build)
        channel = grpc.aio.insecure_channel(server.address)
        started.append((server, channel))
        return Serving(server, channel, engines[-1])

    yield start_one
    for server, channel in started:
        await channel.close()
        await server.stop(0.0)
