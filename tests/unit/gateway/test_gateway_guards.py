"""What is let in, what is not, and what every answer carries."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faceteer_gateway.application import application
from faceteer_gateway.guards import host_of
from faceteer_gateway.http_server import bind
from faceteer_gateway.service import http_address
from faceteer_gateway.settings import GatewaySettings
from faceteer_gateway.upstream import Upstream
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.server import StartupError
from http_client import ask, call

OPEN = "/faceteer.v1.StudioService/OpenImage"
Gateway = Callable[..., AbstractAsyncContextManager[SimpleNamespace]]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:8080", "192.168.1.5"])
async def test_this_machine_and_addresses_are_answered(world: SimpleNamespace, host: str) -> None:
    assert (await ask(world.port, "/healthz", headers={"host": host}, method="GET")).status == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", ""])
async def test_a_name_that_somebody_else_pointed_here_is_not(world: SimpleNamespace, host: str) -> None:
    reply = await call(world.port, OPEN, {}, {"host": host})
    assert reply.status == 421
    assert "FACETEER_GATEWAY_HOSTS" in reply.json()["message"]
    assert world.studio.seen is None


async def test_the_operator_may_name_hosts(gateway: Gateway) -> None:
    async with gateway(gateway_hosts="Faces.example, localhost") as running:
        for host, status in (("faces.example:443", 200), ("localhost", 200), ("other.example", 421)):
            assert (await ask(running.port, "/healthz", headers={"host": host}, method="GET")).status == status
    assert "*" in GatewaySettings(gateway_hosts="*").hosts


def test_a_host_header_is_read_without_port_and_brackets() -> None:
    headers = ("Localhost:80", "[::1]:80", "::1", "")
    assert [host_of(header) for header in headers] == ["localhost", "::1", "", ""]


@pytest.mark.parametrize("path", ["/", "/healthz", "/nothing", OPEN])
async def test_every_answer_is_strict_with_browsers(world: SimpleNamespace, path: str) -> None:
    headers = (await ask(world.port, path, method="GET")).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-request-id"]
    assert "server" not in headers


async def test_other_sites_may_not_call_unless_they_are_named(gateway: Gateway) -> None:
    asked = {
        "origin": "https://page.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,connect-protocol-version,x-faceteer-access",
    }
    async with gateway() as closed:
        assert "access-control-allow-origin" not in (await ask(closed.port, OPEN, b"", asked, "OPTIONS")).headers
        reply = await call(closed.port, OPEN, {}, {"origin": "https://page.example"})
        assert "access-control-allow-origin" not in reply.headers
    async with gateway(gateway_origins="https://page.example/") as open_to_one:
        preflight = await ask(open_to_one.port, OPEN, b"", asked, "OPTIONS")
        assert (preflight.status, preflight.headers["access-control-allow-origin"]) == (200, "https://page.example")
        reply = await call(open_to_one.port, OPEN, {}, {"origin": "https://page.example"})
        assert "grpc-status" in reply.headers["access-control-expose-headers"].lower()
        other = await call(open_to_one.port, OPEN, {}, {"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_a_form_of_another_site_cannot_make_a_call(world: SimpleNamespace) -> None:
    # What a browser sends without asking first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        reply = await ask(world.port, OPEN, b"{}", {"content-type": kind})
        assert reply.status == 415
    assert world.studio.seen is None


async def test_health_names_each_part(gateway: Gateway) -> None:
    async with gateway(warm_up=False) as starting:
        reply = await ask(starting.port, "/healthz", method="GET")
        assert (reply.status, reply.json()["status"]) == (503, "NOT_SERVING")
        refused = await call(starting.port, OPEN, {})
        assert (refused.status, refused.json()["code"]) == (503, "unavailable")
        await starting.server.warm_up()
        reply = await ask(starting.port, "/healthz", method="GET")
        assert (reply.status, reply.json()["status"]) == (200, "SERVING")
        assert reply.json()["parts"]["faceteer.v1.StudioService"] == "SERVING"
        assert reply.json()["parts"]["faceteer.v1.SaeService"] == "NOT_FOUND"


async def test_a_studio_that_is_not_there_is_told_as_such(gateway: Gateway) -> None:
    async with gateway(gateway_studio_address="127.0.0.1:1") as alone:
        reply = await ask(alone.port, "/healthz", method="GET")
        assert (reply.status, reply.json()["status"]) == (503, "UNREACHABLE")
        failed = await call(alone.port, OPEN, {})
        assert (failed.status, failed.json()["code"]) == (503, "unavailable")
        assert failed.json()["message"].startswith("studio: cannot be reached")
        assert [detail["type"] for detail in failed.json()["details"]] == [
            "google.rpc.ErrorInfo",
            "google.rpc.RetryInfo",
        ]
        assert (await ask(alone.port, "/icons/3.webp", method="GET")).status == 503


async def test_icons_and_examples_have_addresses_that_a_browser_keeps(world: SimpleNamespace) -> None:
    first = await ask(world.port, "/icons/3.webp", method="GET")
    assert (first.status, first.headers["content-type"], first.body) == (200, "image/webp", b"RIFF icon")
    assert first.headers["etag"] == '"r1"'
    again = await ask(world.port, "/icons/3.webp", headers={"if-none-match": '"r1"'}, method="GET")
    assert (again.status, world.library.icons_asked) == (304, 1)
    named = await ask(world.port, "/icons/3.webp?v=r1", method="GET")
    assert "immutable" in named.headers["cache-control"]
    assert "immutable" not in (await ask(world.port, "/icons/3.webp?v=r0", method="GET")).headers["cache-control"]
    missing = await ask(world.port, "/icons/10.webp", method="GET")
    assert (missing.status, missing.json()["message"]) == (404, "feature 10 has no icon yet")
    assert missing.headers["cache-control"] == "no-store"
    assert (await ask(world.port, "/examples/3/1.webp", method="GET")).body == b"second"
    assert (await ask(world.port, "/examples/3/2.webp", method="GET")).status == 404
    assert (await ask(world.port, f"/icons/{10**30}.webp", method="GET")).status == 404


async def test_without_a_built_page_the_address_says_what_it_is(world: SimpleNamespace) -> None:
    reply = await ask(world.port, "/", method="GET")
    assert reply.status == 200
    text = reply.body.decode()
    assert "Faceteer" in text
    assert "<script" not in text


async def test_a_built_page_is_served_with_hashed_files_kept(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("<p>the page")
    (tmp_path / "assets" / "index-1a2b.js").write_text("run()")
    settings = GatewaySettings(gateway_hosts="*")
    app = application(Upstream("127.0.0.1:1"), Metrics(), settings, tmp_path)

    async def get(path: str) -> tuple[int, str, bytes]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "method": "GET", "path": path, "root_path": ""}
        scope |= {"query_string": b"", "headers": []}
        await app(scope, receive, send)
        headers = dict(sent[0]["headers"])
        body = b"".join(message.get("body", b"") for message in sent[1:])
        return sent[0]["status"], headers.get(b"cache-control", b"").decode(), body

    assert await get("/") == (200, "no-cache", b"<p>the page")
    assert await get("/features/41") == (200, "no-cache", b"<p>the page")
    status, caching, body = await get("/assets/index-1a2b.js")
    assert (status, body) == (200, b"run()")
    assert "immutable" in caching
    assert (await get("/assets/gone"))[0] == 404
    assert (await get("/robots.txt"))[0] == 404
    # Calls are never taken for the page's own addresses.
    assert (await get(OPEN))[0] == 405
    assert (await get("/faceteer.v1.StudioService/OpenPicture"))[0] == 404


def test_an_address_in_use_is_one_sentence_that_says_what_to_do() -> None:
    with (
        bind("127.0.0.1:0") as taken,
        pytest.raises(StartupError, match="choose another address with --gateway-listen"),
    ):
        bind("127.0.0.1:%d" % taken.getsockname()[1])  # noqa: UP031 # braces would read worse


def test_the_address_that_is_printed_is_one_to_click() -> None:
    assert http_address("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert http_address("::1", 80) == "http://[::1]:80"


async def test_no_http_where_none_is_asked_for(gateway: Gateway) -> None:
    async with gateway(gateway_listen="none") as running:
        with pytest.raises(ConnectionRefusedError):
            await ask(running.port, "/healthz", method="GET")
