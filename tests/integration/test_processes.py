"""Each service as the process that docker-compose.yml describes: starts without Redis, stops on SIGTERM, comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from compose_processes import OURS, ComposeProcesses, read_compose
from faceteer.v1 import studio_pb2, studio_pb2_grpc
from faceteer_runtime.healthcheck import check
from rpc_errors import read_error
from tiny_bundle import picture_bytes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def stack(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeProcesses]:
    with ComposeProcesses(tiny_bundle, tmp_path_factory.mktemp("processes")) as processes:
        yield processes


def open_picture(address: str, seed: int = 1) -> studio_pb2.OpenImageResponse:
    with grpc.insecure_channel(address) as channel:
        request = studio_pb2.OpenImageRequest(input=studio_pb2.ImageInput(image=picture_bytes(seed)))
        return studio_pb2_grpc.StudioServiceStub(channel).OpenImage(request, timeout=20)


def test_the_compose_file_builds_one_image_a_member_and_runs_it_by_its_module() -> None:
    compose = read_compose()
    assert set(OURS) < set(compose)
    for name in OURS:
        service = compose[name]
        assert service["build"]["args"]["MEMBER"] == name
        assert service["command"] == ["python", "-m", f"faceteer_{name}"]
        assert "FACETEER_REDIS_URL" in service["environment"]
        assert service["healthcheck"]["test"][:4] == ["CMD", "python", "-m", "faceteer_runtime.healthcheck"]
    assert {"redis", "prometheus", "grafana"} < set(compose)


def test_metrics_are_served_where_prometheus_looks(stack: ComposeProcesses) -> None:
    from urllib.request import urlopen

    open_picture(stack.address)
    for name in OURS:
        with urlopen(f"http://{stack.address_of(name, 9100)}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        assert "faceteer_calls_total" in text
        if name == "encoder":
            assert 'method="EncodeImages"' in text


@pytest.mark.slow
def test_a_service_that_restarts_is_found_again(stack: ComposeProcesses) -> None:
    open_picture(stack.address)
    assert stack.stop_service("sae") == 0
    with pytest.raises(grpc.RpcError) as caught:
        open_picture(stack.address)
    failure = read_error(caught.value)
    assert (failure.reason, failure.metadata["service"]) == ("UPSTREAM_UNAVAILABLE", "sae")
    stack.start_service("sae")
    stack.wait_healthy("sae")
    # UNAVAILABLE says when to try again: after a second. The SDK does so by itself.
    assert failure.retry_after == 1.0
    time.sleep(2 * failure.retry_after)
    assert open_picture(stack.address).l0 > 0


@pytest.mark.slow
def test_everything_starts_and_serves_without_redis(stack: ComposeProcesses) -> None:
    stack.redis.kill()
    assert [stack.stop_service(name) for name in ("studio", "encoder")] == [0, 0]
    for name in ("encoder", "studio"):
        stack.start_service(name)
    stack.wait_healthy("encoder", "studio")
    assert open_picture(stack.address, 77).l0 > 0
    stack.redis.start()


def test_a_bundle_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    for module, flags in (("faceteer_encoder", []), ("faceteer_studio", ["--all-in-one"])):
        command = [sys.executable, "-m", module, *flags, "--listen", "127.0.0.1:0", "--bundle", str(tmp_path / "none")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ}, cwd=ROOT)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert str(tmp_path / "none") in done.stderr


def test_nobody_serves_at_an_address_that_is_free() -> None:
    assert check("127.0.0.1:1").startswith("no answer")
