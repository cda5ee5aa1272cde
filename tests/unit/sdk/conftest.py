"""The fake server, and clients of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import faceteer
import pytest
from unit.sdk.either_client import Blocking
from unit.sdk.fake_server import FakeServer

_QUICK = faceteer.Retries(first=0.01)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


@pytest.fixture
def client(server: FakeServer) -> Iterator[faceteer.Client]:
    with faceteer.connect(server.address, timeout=10, retries=_QUICK) as connected:
        yield connected


@pytest.fixture
async def async_client(server: FakeServer) -> AsyncIterator[faceteer.AsyncClient]:
    async with faceteer.connect_async(server.address, timeout=10, retries=_QUICK) as connected:
        yield connected


@pytest.fixture(params=["sync", "async"])
def either(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Any]:
    """The blocking client, and the asyncio one behind the same face."""
    if request.param == "sync":
        with faceteer.connect(server.address, timeout=10, retries=_QUICK) as connected:
            yield connected
        return
    with asyncio.Runner() as runner:
        client = faceteer.connect_async(server.address, timeout=10, retries=_QUICK)
        try:
            yield Blocking(client, runner)
        finally:
            runner.run(client.close())
