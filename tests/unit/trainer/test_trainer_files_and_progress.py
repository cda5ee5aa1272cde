"""What every job shares: how it writes, how it keeps other runs out, and how it says how far it is."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest
from faceteer_trainer import progress as progress_module
from faceteer_trainer.errors import JobError
from faceteer_trainer.files import job_file, locked, writing
from faceteer_trainer.progress import Progress
from rich.console import Console


@pytest.mark.parametrize(
    ("number", "fix"), [(errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EACCES, "mend that")]
)
def test_what_stops_a_write_is_one_sentence_with_the_way_on(tmp_path: Path, number: int, fix: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    words = rf"a\.bin: could not be written \(.*\); {fix} and run the same command again: what is done is kept"

    def write() -> None:
        with job_file(path) as part:
            part.write_bytes(b"half")
            raise OSError(number, os.strerror(number), str(part))

    with pytest.raises(JobError, match=words):
        write()
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]
    assert path.read_bytes() == b"before"


def test_a_write_names_the_file_at_fault_where_the_system_does(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="elsewhere: could not be written"), writing(tmp_path):
        raise OSError(errno.EACCES, "no", "elsewhere")
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError("not ours")


def test_a_folder_is_held_by_one_run_and_free_again_after_it_or_its_failure(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with locked(folder):
        assert (folder / ".lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(JobError, match=rf"another run \(process {os.getpid()}\) works in it"), locked(folder):
            pass
        # The refused one has not let go of what it never held.
        with pytest.raises(JobError, match="another run"), locked(folder):
            pass
    assert (folder / ".lock").read_text() == ""
    with pytest.raises(ValueError, match="mine"), locked(folder):
        raise ValueError("mine")
    with locked(folder):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match=r"cannot be written to .* choose another folder"), locked(tmp_path / "file"):
        pass


def test_progress_tells_rate_and_time_left_of_this_run_alone() -> None:
    progress = Progress()
    progress("embed", 4_000, 10_000)
    began = progress._began["embed"][0]
    assert progress.said("embed", 6_000, 10_000, began + 4) == "6,000 of 10,000 (60 %), 500/s, 0:00:08 left"
    progress("naming", 0.0)
    began = progress._began["naming"][0]
    assert progress.said("naming", 0.25, 1.0, began + 1200) == "25%, 1:00:00 left"


def test_without_a_terminal_progress_is_a_line_now_and_then_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now, out = [100.0], io.StringIO()
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with Progress(Console(file=out), unit="MB") as progress:
        for second, done in ((0, 0), (9, 9_000_000), (10, 10_000_000), (19, 19_000_000), (20, 30_000_000)):
            now[0] = 100.0 + second
            progress("pull", done, 30_000_000)
    assert out.getvalue().splitlines() == [
        "pull: 10 of 30 MB (33 %), 1/s, 0:00:20 left",
        "pull: 30 of 30 MB (100 %), 2/s, 0:00:00 left",
    ]
