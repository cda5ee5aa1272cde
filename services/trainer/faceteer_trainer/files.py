"""What a job writes: files that are complete or absent, in folders that one run at a time locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from faceteer_runtime.files import PART_SUFFIX, whole_file

from faceteer_trainer.errors import JobError

_LOCK = ".lock"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what stops a write in this block into a JobError that says how to go on."""
    try:
        yield
    except OSError as error:
        fix = "make room" if error.errno in _FULL else "mend that"
        where = str(error.filename or path).removesuffix(PART_SUFFIX)
        raise JobError(
            f"{where}: could not be written ({error.strerror}); {fix} and run the same command again: "
            "what is done is kept"
        ) from None


@contextlib.contextmanager
def job_file(path: Path) -> Iterator[Path]:
    """A path to write to, which is at `path`, on the disk, when the block ends, and nowhere when anything went wrong.

    Raises:
        JobError: the disk is full, or may not be written to.
    """
    with writing(path), whole_file(path, durable=True) as part:
        yield part


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Makes the folder if need be, and holds it for this process; an ended process holds no lock.

    Raises:
        JobError: another run holds it, or it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise JobError(f"{directory}: cannot be written to ({error.strerror}); choose another folder") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(lock, 32).decode().strip() or "unknown"
            raise JobError(f"{directory}: another run (process {pid}) works in it; wait for it to end") from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
        os.ftruncate(lock, 0)
    finally:
        os.close(lock)
