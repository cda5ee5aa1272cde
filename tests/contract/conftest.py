"""Both ways to run, one after the other: every contract test passes against each, through one address."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from all_in_one import http_address, start_all_in_one
from compose_processes import ComposeProcesses, read_compose
from faceteer.v1 import (
    encoder_pb2_grpc,
    generator_pb2_grpc,
    library_pb2_grpc,
    sae_pb2_grpc,
    studio_pb2_grpc,
)
from tiny_bundle import gate_feature


def stubs(address: str, http: str) -> SimpleNamespace:
    """A channel to ``address`` and a stub of each service on it; and where the same is served over HTTP."""
    channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", 64 << 20)])
    return SimpleNamespace(
        address=address,
        http=http,
        channel=channel,
        encoder=encoder_pb2_grpc.EncoderServiceStub(channel),
        sae=sae_pb2_grpc.SaeServiceStub(channel),
        generator=generator_pb2_grpc.GeneratorServiceStub(channel),
        library=library_pb2_grpc.LibraryServiceStub(channel),
        studio=studio_pb2_grpc.StudioServiceStub(channel),
    )


# One feature that fires often enough to be met, in a class that is gated by default; and a key that opens it.
GATED, GATED_LABEL, GATED_CLASS = 50, "bloodbath", "violence"
KEY = "open-sesame-for-tests"


@pytest.fixture(scope="session")
def gated_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with one feature of a safety class."""
    directory = tmp_path_factory.mktemp("gated") / "tiny"
    shutil.copytree(tiny_bundle, directory)
    gate_feature(directory, GATED, GATED_LABEL, GATED_CLASS)
    return directory


@pytest.fixture(scope="session", params=["all-in-one", "compose"])
def server(
    request: pytest.FixtureRequest, gated_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """Stubs of a running server: first the all-in-one process, then docker-compose.yml's services with Redis."""
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "all-in-one":
        process, address = start_all_in_one(gated_bundle, directory, FACETEER_LIBRARY_ACCESS_KEYS=KEY)
        yield stubs(address, http_address(directory))
        process.terminate()
        assert process.wait(30) == 0
    else:
        compose = read_compose()
        compose["library"]["environment"]["FACETEER_LIBRARY_ACCESS_KEYS"] = f"another-one,{KEY}"
        with ComposeProcesses(gated_bundle, directory, compose) as stack:
            yield stubs(stack.address, stack.http)
