"""TLS: a server with a certificate of its own, trusted and not."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import faceteer
import grpc
import pytest
from unit.sdk.fake_server import FakeServer

openssl = shutil.which("openssl")
pytestmark = pytest.mark.skipif(openssl is None, reason="makes its certificate with openssl")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A key and a self-signed certificate for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    key, chain = folder / "key.pem", folder / "chain.pem"
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    command = [str(openssl), *words.split(), "-keyout", str(key), "-out", str(chain)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return key, chain


def test_a_server_is_reached_over_tls_by_both_clients(certificate: tuple[Path, Path]) -> None:
    key, chain = certificate
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), chain.read_bytes())])
    with FakeServer(credentials) as server:
        for roots in (chain, str(chain), chain.read_bytes()):
            with faceteer.connect(server.address, tls=faceteer.Tls(roots)) as client:
                assert client.status().bundle == "fake"

        async def asynchronous() -> str:
            async with faceteer.connect_async(server.address, tls=faceteer.Tls(chain)) as client:
                return (await client.status()).bundle

        assert asyncio.run(asynchronous()) == "fake"


def test_a_certificate_that_is_not_trusted_is_not_talked_to(certificate: tuple[Path, Path]) -> None:
    key, chain = certificate
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), chain.read_bytes())])
    with (
        FakeServer(credentials) as server,
        faceteer.connect(server.address, tls=True, retries=0) as client,
        pytest.raises(faceteer.ServerUnreachableError),
    ):
        client.status(timeout=5)
    assert server.calls == []


def test_a_missing_certificate_file_is_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError):
        faceteer.connect("a:1", tls=faceteer.Tls("nowhere.pem"))
