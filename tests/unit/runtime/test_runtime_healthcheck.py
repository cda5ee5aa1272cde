"""The container's health check, against a real server."""

from __future__ import annotations

import asyncio
import sys

import pytest
from faceteer_runtime import healthcheck
from faceteer_runtime.bundle import Bundle
from faceteer_runtime.cache import Cache
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.server import start
from faceteer_runtime.service import Resources
from faceteer_runtime.settings import ServiceSettings


async def test_it_says_what_the_server_says(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, metrics = ServiceSettings(listen="127.0.0.1:0"), Metrics()
    server = await start(
        settings, lambda _: [], Resources(settings, Bundle.none(), Cache(0, metrics), metrics), warm_up=False
    )
    assert await asyncio.to_thread(healthcheck.check, server.address) == "NOT_SERVING"
    await server.warm_up()
    assert await asyncio.to_thread(healthcheck.check, server.address) == "SERVING"
    monkeypatch.setattr(sys, "argv", ["healthcheck", server.address])

    def status() -> int:
        with pytest.raises(SystemExit) as exit_:
            healthcheck.main()
        return exit_.value.code

    assert await asyncio.to_thread(status) == 0
    await server.stop()
    assert await asyncio.to_thread(status) == 1
    assert (await asyncio.to_thread(healthcheck.check, server.address)).startswith("no answer")


def test_it_wants_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["healthcheck"])
    with pytest.raises(SystemExit, match="HOST:PORT"):
        healthcheck.main()
