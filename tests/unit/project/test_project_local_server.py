"""`make up` and `make down`: which bundle is served where, and what to do about it. The servers are small real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "deploy"))

import local_server  # noqa: E402  # deploy/ holds scripts, no package

SERVER = """
import json, sys
from concurrent import futures
from pathlib import Path
import grpc
from faceteer.v1 import studio_pb2, studio_pb2_grpc
from grpc_health.v1 import health, health_pb2_grpc

address, bundle = sys.argv[1], Path(sys.argv[2])
manifest = json.loads((bundle / "bundle.json").read_text())

class Studio(studio_pb2_grpc.StudioServiceServicer):
    def GetStudio(self, request, context):
        answer = studio_pb2.GetStudioResponse(bundle=manifest["name"])
        for name, facts in manifest["parts"].items():
            setattr(answer.revisions, name, facts["revision"])
        return answer

server = grpc.server(futures.ThreadPoolExecutor(2))
health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
studio_pb2_grpc.add_StudioServiceServicer_to_server(Studio(), server)
assert server.add_insecure_port(address)
server.start()
server.wait_for_termination()
"""


def bundle_at(directory: Path, revision: str) -> Path:
    (directory / "sae").mkdir(parents=True)
    manifest = {"format": 1, "name": "small", "parts": {"sae": {"revision": revision}}, "files": []}
    (directory / "bundle.json").write_text(json.dumps(manifest))
    return directory


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A free address, at which `make up` starts the small server."""
    script = tmp_path / "faceteer_studio.py"  # so named, for `ps` shows it
    script.write_text(SERVER)
    monkeypatch.setattr(local_server, "ROOT", tmp_path)
    monkeypatch.setattr(local_server, "STATE", tmp_path / "up")
    monkeypatch.setattr(
        local_server, "command", lambda address, bundle: [sys.executable, str(script), address, str(bundle)]
    )
    started: list[subprocess.Popen[bytes]] = []

    class Kept(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Kept)
    address = local_server.free_address()
    yield address
    if local_server._started_at(address):
        local_server.down(address)
    for process in started:  # `make up` forgets the process it leaves behind; Python would complain of that
        process.poll()


def test_the_same_bundle_is_left_running_and_another_takes_its_place(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = bundle_at(tmp_path / "first", "1" * 16), bundle_at(tmp_path / "second", "2" * 16)
    local_server.up(address, first)
    port = address.rpartition(":")[2]
    said = capsys.readouterr().out
    assert f"Serving {first} at {address}" in said
    assert f"Stop:  make down ADDRESS={address}" in said
    before = local_server._started_at(address)
    local_server.up(address, first)
    assert f"{first} is already served at {address}" in capsys.readouterr().out
    assert local_server._started_at(address) == before
    local_server.up(address, second)
    assert f"Stopping the server of {first} at {address}" in capsys.readouterr().out
    assert local_server.served(address) == ("small", {**dict.fromkeys(PARTS, ""), "sae": "2" * 16})
    local_server.down(address)
    assert not local_server.is_serving(address)
    assert not (tmp_path / "up" / f"{port}.json").exists()


PARTS = ("encoder", "sae", "generator", "library")


def test_a_server_that_was_not_started_here_is_left_alone_and_named(address: str, tmp_path: Path) -> None:
    mine, theirs = bundle_at(tmp_path / "mine", "1" * 16), bundle_at(tmp_path / "theirs", "2" * 16)
    process = subprocess.Popen(local_server.command(address, theirs))
    try:
        local_server.wait_until_serving(process, address, tmp_path / "log")
        with pytest.raises(SystemExit, match=r"serves the bundle 'small', not .*mine.*\n.*make up ADDRESS=127"):
            local_server.up(address, mine)
        local_server.up(address, theirs)
        with pytest.raises(SystemExit, match="no server that `make up` started"):
            local_server.down(address)
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(20)


def test_a_missing_bundle_is_told_with_what_can_be_served_before_anything_starts(address: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nowhere: no bundle here.*\n.*make up BUNDLE=deploy/bundles/postcards"):
        local_server.up(address, tmp_path / "nowhere")
    assert not (tmp_path / "up").exists()


def test_down_names_the_servers_at_other_ports(address: str, tmp_path: Path) -> None:
    local_server.up(address, bundle_at(tmp_path / "first", "1" * 16))
    with pytest.raises(SystemExit, match=f"make down ADDRESS={address}"):
        local_server.down(local_server.free_address())


def test_a_recorded_process_id_that_is_another_programs_now_is_not_stopped(address: str, tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    port = address.rpartition(":")[2]
    record = {"pid": os.getppid(), "address": address, "bundle": "old"}
    (tmp_path / "up" / f"{port}.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="no server that `make up` started"):
        local_server.down(address)


def test_the_all_in_one_process_tells_a_missing_bundle_before_it_loads_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from faceteer_studio import all_in_one\n"
        f"try: all_in_one.main(['--bundle', {str(tmp_path / 'nowhere')!r}])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "no bundle here" in done.stderr
