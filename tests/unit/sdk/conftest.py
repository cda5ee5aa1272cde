"""The fake server, and clients of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import faceteer
import pytest
from unit.sdk.fake_server import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


@pytest.fixture
def client(server: FakeServer) -> Iterator[faceteer.Client]:
    with faceteer.connect(server.address, timeout=10, retries=faceteer.Retries(first=0.01)) as connected:
        yield connected


@pytest.fixture
async def async_client(server: FakeServer) -> AsyncIterator[faceteer.AsyncClient]:
    async with faceteer.connect_async(server.address, timeout=10, retries=faceteer.Retries(first=0.01)) as connected:
        yield connected
