"""An encoder bundle, and a real server on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from faceteer.v1 import encoder_pb2_grpc
from faceteer_encoder.service import build
from faceteer_encoder.settings import EncoderSettings
from faceteer_runtime.bundle import seal
from faceteer_runtime.server import RunningServer, start
from tiny_bundle import EMBED_DIM, _write_encoder

Serve = Callable[..., Awaitable["Served"]]


class Served:
    """A running server and a stub on it."""

    def __init__(self, server: RunningServer, channel: grpc.aio.Channel) -> None:
        self.server, self.channel = server, channel
        self.stub = encoder_pb2_grpc.EncoderServiceStub(channel)

    def value(self, name: str, **labels: str) -> float:
        """A metric of the server."""
        return self.server.resources.metrics.value(name, **labels)


@pytest.fixture(scope="session")
def encoder_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder alone in a bundle; read-only by agreement."""
    directory = tmp_path_factory.mktemp("encoder-bundle") / "tiny"
    _write_encoder(directory / "encoder")
    parts: dict[str, Any] = {"encoder": {"kind": "open_clip", "embed_dim": EMBED_DIM}}
    seal(directory, {"name": "tiny", "description": "", "parts": parts, "licences": {}})
    return directory


@pytest.fixture
async def serve(encoder_bundle: Path) -> AsyncIterator[Serve]:
    """Starts servers with given settings; stops them all."""
    async with AsyncExitStack() as stack:

        async def started(bundle: Path = encoder_bundle, **settings: Any) -> Served:
            server = await start(EncoderSettings(listen="127.0.0.1:0", bundle=bundle, **settings), build)
            stack.push_async_callback(server.stop, 0.0)
            options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
            channel = grpc.aio.insecure_channel(server.address, options=options)
            stack.push_async_callback(channel.close)
            return Served(server, channel)

        yield started


@pytest.fixture
async def served(serve: Serve) -> Served:
    """A server with default settings."""
    return await serve()
