"""The README's example, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import faceteer
import pytest
from PIL import Image
from unit.sdk.fake_server import FakeServer, png

README = Path(__file__).parents[3] / "clients" / "python" / "README.md"


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
