"""Which files of the services a piece of work enters."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

SERVICES = str(Path(__file__).parents[1] / "services")


@contextlib.contextmanager
def files_entered(first: str) -> Iterator[list[str]]:
    """Records "package/file.py" each time that a call goes from one file of the services into another.

    Threads are watched if they are started within. ``first`` names the function with whose call recording begins.
    """
    entered: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(SERVICES) or not (entered or code.co_name == first):
            return
        file = "/".join(Path(code.co_filename).parts[-2:])
        if not entered or entered[-1] != file:
            entered.append(file)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield entered
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
