"""Generates the blocking client, ``faceteer/_sync``, from the asyncio one, or checks that it is up to date.

Usage: ``python clients/python/unasync.py [--check]``. What leaving out ``await`` cannot produce is in
``faceteer/_transport/aio.py`` and ``blocking.py``, which have the same names and are both written by hand.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent / "faceteer"
SOURCE, TARGET = PACKAGE / "_async", PACKAGE / "_sync"
HEADER = "# Generated from {path} by clients/python/unasync.py: edit that file, then run `make client`.\n"

REPLACEMENTS = [
    # Sentences and types that are true of one client only.
    (
        r"The asyncio client, written by hand\. :mod:`faceteer\._sync` is generated from it by",
        "The blocking client, made by",
    ),
    (r"of the event loop that first uses it", "usable from several threads"),
    (r"an iterable or an async one, read as", "read as"),
    (
        r"called with each rough picture, and awaited when it is a coroutine function; so are all callbacks",
        "called with each rough picture",
    ),
    (r" \| AsyncIterable\[Picture\]", ""),
    (r"(?m)^from collections\.abc import AsyncIterable, ", "from collections.abc import "),
    (r"\bAwaitable\[(\w+)\]", r"\1"),
    (r"\bAwaitable, ", ""),
    # The language.
    (r"\basync (def|with|for)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAsync(?=[A-Z])", ""),
    (r"\baclosing\b", "closing"),
    (r"__a(enter|exit)__", r"__\1__"),
    (r"\bGenerator\[(\w+), None\]", r"Generator[\1, None, None]"),
    # The modules.
    (r"\bconnect_async\b", "connect"),
    (r"\bfaceteer\._async\b", "faceteer._sync"),
    (r"\b_transport\.aio\b", "_transport.blocking"),
]


def blocking(path: Path) -> str:
    """The blocking twin of an asyncio module, formatted."""
    text = path.read_text()
    for pattern, replacement in REPLACEMENTS:
        text = re.sub(pattern, replacement, text)
    text = HEADER.format(path=path.relative_to(PACKAGE.parent).as_posix()) + text
    # Given on the command line, since ruff reads the code from stdin and cannot find it out from the file.
    ours = "--config=lint.isort.known-first-party=['faceteer']"
    for command in (["check", "--select=I,F401", "--fix-only", "--quiet", ours], ["format", "--quiet"]):
        name = f"--stdin-filename={TARGET / path.name}"
        ruff = [sys.executable, "-m", "ruff", *command, name, "-"]
        text = subprocess.run(ruff, input=text, text=True, capture_output=True, check=True).stdout
    return text


def main() -> None:
    fresh = {path.name: blocking(path) for path in sorted(SOURCE.glob("*.py"))}
    committed = {path.name: path.read_text() for path in TARGET.glob("*.py")}
    if "--check" in sys.argv[1:]:
        stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
        if stale:
            raise SystemExit(f"the blocking client is out of date (run `make client`): {', '.join(stale)}")
        return
    TARGET.mkdir(exist_ok=True)
    for name in committed.keys() - fresh.keys():
        (TARGET / name).unlink()
    for name, text in fresh.items():
        (TARGET / name).write_text(text)


if __name__ == "__main__":
    main()
