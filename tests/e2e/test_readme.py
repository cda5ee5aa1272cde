"""What the README promises, done as it says, on the bundle that ships with the repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from all_in_one import start_all_in_one
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "deploy" / "bundles" / "postcards"
CLI = Path(sys.executable).parent / "faceteer"

pytestmark = pytest.mark.slow


class Server(NamedTuple):
    """Where it serves: gRPC as host:port, HTTP as a URL."""

    address: str
    http: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An all-in-one server on the postcards bundle."""
    folder = tmp_path_factory.mktemp("postcards")
    process, address = start_all_in_one(BUNDLE, folder)
    (http,) = re.findall(r"serving HTTP at (http://[^\s\"]+)", (folder / "all-in-one.log").read_text())
    yield Server(address, http)
    process.terminate()
    assert process.wait(30) == 0


@pytest.fixture
def address(server: Server) -> str:
    return server.address


def brightness(path: Path) -> float:
    with Image.open(path) as picture:
        return float(np.asarray(picture.convert("L")).mean())


README = (ROOT / "README.md").read_text()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what the README's lines name, in which they may write."""
    for name in ("deploy", "protos"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def shell(lines: str, clone: Path, server: Server) -> str:
    """What the lines print in a shell, the server being where it is rather than at its default ports."""
    lines = lines.replace("127.0.0.1:50050", server.address).replace("http://127.0.0.1:8080", server.http)
    environment = {**os.environ, "FACETEER_ADDRESS": server.address}
    done = subprocess.run(
        ["bash", "-ec", lines], cwd=clone, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def block_with(words: str) -> str:
    """The README's indented block that holds these words."""
    blocks = re.findall(r"(?:^    .*\n)+", README, re.MULTILINE)
    return next(block for block in blocks if words in block)


def test_the_sdks_lines_run_as_they_stand_and_night_is_dark(server: Server, clone: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = code.replace("localhost:50050", server.address)
    # What stands in a comment, too.
    code += '    other.edit(faceteer.Recipe.load("night.json")).render().save("cats-night.png")\n'
    (clone / "lines.py").write_text(code)
    printed = shell(".venv/bin/python lines.py", clone, server)
    assert "night" in printed
    assert {path.name for path in clone.iterdir()} >= {"boat-night.png", "cats-night.png", "night.json", "mixed.png"}
    day = brightness(BUNDLE / "examples" / "boat-day.png")
    assert brightness(clone / "boat-night.png") < 0.8 * day
    with Image.open(clone / "mixed.png") as mixed:
        assert mixed.size == (64, 64)
    assert json.loads((clone / "night.json").read_text())["revisions"]


def test_the_command_lines_run_as_they_stand(server: Server, clone: Path) -> None:
    printed = shell(block_with("faceteer open"), clone, server)
    assert "boat" in printed
    assert brightness(clone / "night.png") < 0.6 * brightness(BUNDLE / "examples" / "boat-day.png")


def test_the_lines_of_other_clients_open_the_example_and_a_photograph_of_five_megabytes(
    server: Server, clone: Path
) -> None:
    by_buf = block_with("buf curl")
    definitions = "".join(by_buf.splitlines(keepends=True)[:2])
    by_curl = definitions + block_with("| curl")
    noise = np.random.default_rng(0).integers(0, 256, (1300, 1300, 3), np.uint8)
    Image.fromarray(noise).save(clone / "photo.png")
    assert (clone / "photo.png").stat().st_size > 5_000_000
    for lines in (by_buf, by_curl):
        opened = json.loads(shell(lines, clone, server))
        assert "boat" in {feature.get("label") for feature in opened["features"]}
        photo = json.loads(shell(re.sub(r"picture=\S+", "picture=photo.png", lines), clone, server))
        assert photo["embedding"]


def test_the_command_line_turns_a_day_to_night(address: str, tmp_path: Path) -> None:
    boat = BUNDLE / "examples" / "boat-day.png"

    def faceteer(*words: str) -> str:
        command = [str(CLI), "--address", address, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    opened = json.loads(faceteer("open", str(boat), "--json"))
    assert {"embedding_id", "features", "l0", "explained_variance"} <= opened.keys()
    labels = {feature["label"] for feature in opened["features"]}
    assert {"day", "boat", "red", "sea"} <= labels
    assert opened["explained_variance"] > 0.97
    faceteer("edit", str(boat), "--seed", "7", "-o", "same.png", "--json")
    report = json.loads(
        faceteer("edit", str(boat), "--switch", "night=1", "--seed", "7", "--steps", "25", "-o", "night.png", "--json")
    )
    assert report
    assert brightness(tmp_path / "night.png") < 0.6 * brightness(tmp_path / "same.png")
    assert brightness(tmp_path / "same.png") == pytest.approx(brightness(boat), rel=0.1)
    assert "snow" in faceteer("features", "search", "snow")


def test_the_demo_writes_before_and_after_and_stops_what_it_started(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "deploy" / "demo.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "before-and-after.png" in done.stdout
    assert "switch('night', 1.0)" in done.stdout
    assert brightness(tmp_path / "boat-day-night.png") < 0.6 * brightness(BUNDLE / "examples" / "boat-day.png")
    with Image.open(tmp_path / "before-and-after.png") as sheet:
        assert sheet.width > 4 * 256
    recipe = json.loads((tmp_path / "boat-day-night.json").read_text())
    assert recipe["edits"]


def test_the_shipped_bundle_is_what_its_manifest_says() -> None:
    from faceteer_runtime.bundle import verify

    verify(BUNDLE)
    total = sum(path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file())
    assert total <= 40e6
