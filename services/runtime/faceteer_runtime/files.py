"""Files that are complete or absent: written beside their place, and moved into it when they are finished."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# One name a target, so that an interrupted process leaves one file behind at most, and the next one overwrites it.
PART_SUFFIX = ".part"


@contextlib.contextmanager
def whole_file(path: Path | str, *, durable: bool = False) -> Iterator[Path]:
    """A path to write to, ``<name>.part``; when the block ends, that file takes the place of ``path``.

    When the block raises, the part is removed and ``path`` stays as it was.

    Args:
        path: where the file belongs; its directory must exist.
        durable: whether the bytes must be on the disk (fsync) before the file takes its place; for files that a restart
            of the machine may not cost.
    """
    path = Path(path)
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        yield part
        if durable:
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_bytes(path: Path | str, data: bytes, *, durable: bool = False) -> None:
    """Writes a file whole or not at all; see :func:`whole_file`."""
    with whole_file(path, durable=durable) as part:
        part.write_bytes(data)


def write_text(path: Path | str, text: str, *, durable: bool = False) -> None:
    """Writes UTF-8 text whole or not at all; see :func:`whole_file`."""
    write_bytes(path, text.encode(), durable=durable)


def write_json(path: Path | str, value: Any, *, durable: bool = False) -> None:
    """Writes JSON for people to read, whole or not at all; see :func:`whole_file`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", durable=durable)
