"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from faceteer_runtime.files import whole_file, write_bytes, write_json, write_text


def test_a_file_takes_its_place_only_when_it_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with whole_file(path) as part:
        part.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert part == tmp_path / "a.bin.part"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_half_way_leaves_the_old_file_and_no_part(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write() -> None:
        with whole_file(path) as part:
            part.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_before_it_writes_reports_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), whole_file(tmp_path / "a.bin"):
        raise ValueError("mine")


@pytest.mark.parametrize("durable", [True, False])
def test_durable_bytes_are_on_the_disk_before_the_file_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    path, seen = tmp_path / "a.bin", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append((os.fstat(descriptor).st_size, path.exists())))
    write_bytes(path, b"12345", durable=durable)
    assert seen == ([(5, False)] if durable else [])


def test_text_is_utf8_and_json_is_readable(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "Stück")
    assert (tmp_path / "a.txt").read_bytes() == "Stück".encode()
    write_json(tmp_path / "a.json", {"name": "Stück"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text == '{\n  "name": "Stück"\n}\n'
    assert json.loads(text) == {"name": "Stück"}
