"""The README's example and the guide's, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import faceteer
import numpy as np
import pytest
from PIL import Image
from unit.sdk.fake_server import D, FakeServer, png

ROOT = Path(__file__).parents[3]
README = ROOT / "clients" / "python" / "README.md"
GUIDE = ROOT / "docs" / "sdk.md"


def test_the_readmes_example_runs_as_written(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "boat.png").write_bytes(png(10, 20, 30, 40, 50, 250))
    (tmp_path / "beach.png").write_bytes(png(10, 20, 200, 40, 50))
    code = blocks[0].replace("localhost:50050", server.address)
    exec(compile(code, str(README), "exec"), {})
    shown = capsys.readouterr().out
    assert "5 snow 0.98" in shown
    assert "#41             add          0.00       0.50      0.50" in shown
    for name in ("boat-night.png", "beach-night.png", "mixed.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (8, 8)
    assert len(faceteer.Recipe.load(tmp_path / "night.json").edits) == 3


def test_the_guides_examples_run_as_written(
    client: faceteer.Client, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(others) == 6
    monkeypatch.chdir(tmp_path)
    (tmp_path / "boat.png").write_bytes(png(10, 20, 30, 40, 50, 250))
    exec(compile(first.replace("localhost:50050", server.address), str(GUIDE), "exec"), {})
    photo = client.open("boat.png")
    names = {"client": client, "photo": photo, "edit": photo.edit(), "array_d": np.ones(D, np.float32)}
    names |= {"faceteer": faceteer} | dict.fromkeys(["boat", "night_cat", "a", "b"], photo)
    for code in others:
        exec(compile(code, str(GUIDE), "exec"), dict(names))
    assert {"night.webp", "night.png"} <= {path.name for path in tmp_path.iterdir()}


def test_the_guides_table_names_every_filter() -> None:
    for name in faceteer.FeatureFilters.__annotations__:
        assert f"`{name}" in GUIDE.read_text(), name


def test_the_guides_commands_exist() -> None:
    from faceteer.cli.commands import app
    from typer.main import get_command

    lines = re.findall(r"faceteer ((?:features \w+|\w+)(?: .*?)?)(?=\s{4,}|$)", GUIDE.read_text(), re.MULTILINE)
    commands = [line for line in lines if line.startswith(("features", "library", "prompt", "edit"))]
    assert len(commands) >= 10
    for line in commands:
        command, words = get_command(app), line.split()
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {name for option in command.params for name in option.opts + option.secondary_opts}
        used = {word for word in words if re.fullmatch(r"--?[a-z-]+", word)}
        assert used <= known, line
