"""Whether there is enough memory: a process killed for lack of it cannot say why, so this is checked first.

Main memory only; a GPU's own is its library's to check.
"""

from __future__ import annotations

from pathlib import Path

from faceteer_runtime.bundle import BundleError


def available_memory() -> int:
    """Bytes that this process can have now, by the kernel and its control group; very many where neither says."""
    known = [figure for figure in (_meminfo(), _cgroup()) if figure is not None]
    return min(known) if known else 1 << 62


def require_memory(what: str, needed: int, remedy: str, available: int | None = None) -> None:
    """Refuses to begin what cannot end well.

    Args:
        what: is to be loaded, for the sentence.
        needed: bytes, with room to work.
        remedy: what an operator can do besides freeing memory ("use a smaller FACETEER_ENCODER_DTYPE").
        available: bytes; by default what there is now.

    Raises:
        BundleError: there is less than that.
    """
    spare = available_memory() if available is None else available
    if needed > spare:
        raise BundleError(
            f"{what}: needs {gibibytes(needed)} of memory, but this machine has {gibibytes(spare)} to spare; "
            f"{remedy}, or free memory"
        )


def gibibytes(count: int) -> str:
    """A number of bytes for people: "3.6 GiB"."""
    return f"{count / 2**30:.1f} GiB"


def _meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    return None


def _cgroup() -> int | None:
    # Version 2; the kernel gives cached file pages back before it kills, so they do not count as used.
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        return None
