"""Room is asked for before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from faceteer_runtime import memory
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.memory import available_memory, gibibytes, require_memory


def test_what_fits_is_let_through_and_what_does_not_is_refused_with_both_figures() -> None:
    assert 0 < available_memory() <= 1 << 62
    require_memory("weights", 1 << 30, "use less", available=1 << 30)
    words = r"weights: needs 3\.5 GiB of memory, but this machine has 1\.0 GiB to spare; use less, or free memory"
    with pytest.raises(BundleError, match=words):
        require_memory("weights", 7 << 29, "use less", available=1 << 30)
    assert gibibytes(3 << 29) == "1.5 GiB"


def read_from(files: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lets the system's files be these; the others are not there."""
    for name, text in files.items():
        path = tmp_path / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path / name.lstrip("/"))


KERNEL = {"/proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    4096 kB\n"}
GROUP = {
    "/sys/fs/cgroup/memory.max": "3000000\n",
    "/sys/fs/cgroup/memory.current": "1200000\n",
    "/sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 200000\n",
}


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 1 << 62),
        (KERNEL, 4096 << 10),
        (GROUP, 3_000_000 - 1_200_000 + 200_000),
        (KERNEL | GROUP, 2_000_000),
        (KERNEL | GROUP | {"/sys/fs/cgroup/memory.max": "max\n"}, 4096 << 10),
        ({"/proc/meminfo": "MemAvailable: ? kB\n"}, 1 << 62),
    ],
    ids=["neither says", "kernel", "control group", "the smaller of both", "no limit", "nonsense"],
)
def test_there_is_as_much_as_kernel_and_control_group_leave(
    files: dict[str, str], available: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read_from(files, monkeypatch, tmp_path)
    assert available_memory() == available
