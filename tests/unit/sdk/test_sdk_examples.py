"""The examples, run as they stand against the fake server."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import faceteer
import pytest
import uvicorn
from PIL import Image
from unit.sdk.fake_server import FakeServer, Fault, png

EXAMPLES = Path(__file__).parents[3] / "examples"
BOAT = png(10, 20, 30, 40, 50, 250)


def loaded(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, EXAMPLES / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where FastAPI looks annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def backend(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("FACETEER_ADDRESS", server.address)
    app = loaded("fastapi_backend/app.py").app
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started and thread.is_alive():
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join()


def post(url: str, body: bytes) -> tuple[int, Any, bytes]:
    headers = {"Content-Type": "application/octet-stream"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=20) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def test_the_back_end_names_features_and_draws_edits(backend: str) -> None:
    status, _, body = post(f"{backend}/features?top=2", BOAT)
    assert status == 200
    assert [feature["label"] for feature in json.loads(body)["features"]] == ["snow", "day"]
    status, headers, body = post(f"{backend}/edit?feature=night&value=0.5&seed=7", BOAT)
    assert (status, headers["Content-Type"]) == (200, "image/png")
    assert len(headers["X-Recipe"]) == 64
    assert Image.open(io.BytesIO(body)).size == (8, 8)


def test_the_back_end_tells_its_callers_whose_fault_it_was(backend: str, server: FakeServer) -> None:
    status, _, body = post(f"{backend}/features", b"no picture")
    assert (status, json.loads(body)["reason"]) == (400, "UNREADABLE_IMAGE")
    assert post(f"{backend}/edit?feature=nigth", BOAT)[0] == 404
    server.fail("OpenImage", Fault("RESOURCE_EXHAUSTED", "QUEUE_FULL"))
    assert post(f"{backend}/features", BOAT)[0] == 429


def test_the_batch_job_edits_what_is_not_done_yet_and_names_what_failed(server: FakeServer, tmp_path: Path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "edited"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.jpg"):
        (folder / name).write_bytes(BOAT)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("none of these")
    with faceteer.connect(server.address) as client:
        client.open(BOAT).edit().set("night", 1.0).using(seed=7).recipe().save(tmp_path / "night.json")

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(EXAMPLES / "batch_job" / "batch.py"), "night.json", "photos", "edited"]
        environment = {**os.environ, "FACETEER_ADDRESS": server.address}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    done = run()
    assert done.returncode == 1
    assert "broken.png: not a picture" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["a.png.png", "b.png.png", "c.jpg.png"]
    with Image.open(out / "a.png.png") as edited:
        assert edited.convert("RGB").getpixel((0, 0))[0] == 7, "drawn with the recipe's seed"
    calls = server.names().count("EditImage")
    assert run().returncode == 1
    assert server.names().count("EditImage") == calls, "what is there is left alone"
    server.revisions["sae"] = "sae1"
    (out / "a.png.png").unlink()
    stopped = run()
    assert stopped.returncode == 1
    assert "stopped: the recipe was made for sae revision" in stopped.stderr


def test_the_notebook_runs_from_top_to_bottom_and_holds_no_outputs(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = json.loads((EXAMPLES / "notebook" / "features.ipynb").read_text())
    monkeypatch.setenv("FACETEER_ADDRESS", server.address)
    # Jupyter runs it in its own folder; here in a copy of the place, so that nothing it writes stays.
    folder = tmp_path / "examples" / "notebook"
    folder.mkdir(parents=True)
    (tmp_path / "deploy").symlink_to(EXAMPLES.parent / "deploy")
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            exec(compile("".join(cell["source"]), "features.ipynb", "exec"), names)
    names["client"].close()
    assert len(faceteer.Recipe.load(folder / "night.json").edits) == 2


@pytest.mark.skipif(
    shutil.which("node") is None or not (EXAMPLES / "node_client" / "node_modules").is_dir(),
    reason="needs node, and npm install in examples/node_client",
)
def test_the_node_client_opens_edits_and_writes_a_picture(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "boat.png").write_bytes(BOAT)
    command = ["node", str(EXAMPLES / "node_client" / "client.mjs"), "boat.png", "night", "1.0", "night.png"]
    environment = {**os.environ, "FACETEER_ADDRESS": server.address}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "#5 snow 0.980" in done.stdout
    assert "night: 0.08 -> 1.00" in done.stdout
    with Image.open(tmp_path / "night.png") as picture:
        assert picture.size == (8, 8)


def test_the_node_clients_dependencies_have_exact_versions() -> None:
    dependencies = json.loads((EXAMPLES / "node_client" / "package.json").read_text())["dependencies"]
    assert all(version[0].isdigit() for version in dependencies.values())
    assert not list((EXAMPLES / "node_client").glob("*lock*"))
