"""The fake server, and the command line run against it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faceteer.cli import main
from unit.sdk.fake_server import FakeServer, png


@dataclass
class Ran:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """stdout with every run of spaces as one."""
        return " ".join(self.out.split())

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


@pytest.fixture
def faceteer(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Runs ``faceteer WORDS`` in an empty folder with two pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FACETEER_ADDRESS", server.address)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "boat.png").write_bytes(png(10, 20, 30, 40, 50, 250))
    (tmp_path / "other.png").write_bytes(png(10, 20, 200, 40, 50, 0, 0, 0, 0, 0, 0, 0, 0, 90))

    def run(*words: str) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(words)
        written = capsys.readouterr()
        return Ran(int(exit.value.code or 0), written.out, written.err)

    return run
