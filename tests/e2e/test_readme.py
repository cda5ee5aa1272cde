"""What the README promises, done as it says, on the bundle that ships with the repository."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from all_in_one import start_all_in_one
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "deploy" / "bundles" / "postcards"
CLI = Path(sys.executable).parent / "faceteer"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An all-in-one server on the postcards bundle."""
    process, address = start_all_in_one(BUNDLE, tmp_path_factory.mktemp("postcards"))
    yield address
    process.terminate()
    assert process.wait(30) == 0


def brightness(path: Path) -> float:
    with Image.open(path) as picture:
        return float(np.asarray(picture.convert("L")).mean())


def test_the_fifteen_lines_run_as_they_stand_and_night_is_dark(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shutil.copy(BUNDLE / "examples" / "boat-day.png", tmp_path / "boat.png")
    shutil.copy(BUNDLE / "examples" / "cats-meadow.png", tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.replace("localhost:50050", address), "README.md", "exec"), {})
    assert "night" in printed.getvalue()
    assert {path.name for path in tmp_path.iterdir()} >= {"boat-night.png", "night.json", "mixed.png"}
    # Day and night both on: a plain `set` may stay undecided between them, but the file is a picture.
    with Image.open("mixed.png") as mixed:
        assert mixed.size == (64, 64)
    assert json.loads((tmp_path / "night.json").read_text())["revisions"]


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
