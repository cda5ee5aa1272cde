"""Puts new files into a bundle all at once, although hashing takes long and a job may be killed at any time.

stage()        a copy of the bundle inside it, of links; the job writes its files there
seal_staged()  the copy is sealed, with every file hashed: only moving is left to do
commit()       moves the new files, which takes moments; called again after a kill, it resumes
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from faceteer_runtime.bundle import MANIFEST, Bundle, seal
from faceteer_runtime.files import write_json

_READY = "ready.json"


def stage(bundle: Bundle, staging: Path, renewed: Iterable[str]) -> None:
    """Recreates ``staging``: every part of links to the bundle's files, but copies of those that will be renewed.

    Args:
        bundle: stays as it is.
        staging: a directory of its own, on the bundle's disk.
        renewed: paths in the bundle that the job writes; copied where they are there.
    """
    shutil.rmtree(staging, ignore_errors=True)
    copied = set(renewed)
    for part in bundle.parts.values():
        for file in sorted(part.path.rglob("*")):
            inside = file.relative_to(bundle.directory)
            target = staging / inside
            if file.is_dir():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if inside.as_posix() in copied:
                shutil.copyfile(file, target)
            else:
                target.symlink_to(file.resolve())
    manifest = bundle.directory / MANIFEST
    staging.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(manifest, staging / MANIFEST)


def part_revision(staging: Path, part: str) -> str:
    """The revision that a part will have as it is staged now."""
    manifest = json.loads((staging / MANIFEST).read_text(encoding="utf-8"))
    facts = manifest["parts"][part]
    # Apart, so that the other parts need not be hashed for it.
    alone = staging.with_name(staging.name + "-revision")
    shutil.rmtree(alone, ignore_errors=True)
    alone.mkdir()
    (alone / part).symlink_to((staging / part).resolve())
    try:
        seal(alone, {"name": "alone", "parts": {part: facts}})
        revision: str = json.loads((alone / MANIFEST).read_text(encoding="utf-8"))["parts"][part]["revision"]
    finally:
        shutil.rmtree(alone)
    return revision


def seal_staged(staging: Path, renewed: Iterable[str], new_parts: dict[str, dict[str, str]]) -> None:
    """Seals what is staged; from here on only :func:`commit` is left, however often it takes.

    Args:
        staging: made by :func:`stage`, with the renewed files in it.
        renewed: their paths.
        new_parts: facts of parts that the bundle may not have had.
    """
    manifest = json.loads((staging / MANIFEST).read_text(encoding="utf-8"))
    for part, facts in new_parts.items():
        manifest["parts"].setdefault(part, facts)
    seal(staging, manifest)
    # The manifest last: a bundle that is opened before it is in place says which file is not its own.
    write_json(staging / _READY, [*renewed, MANIFEST])


def commit(staging: Path, directory: Path) -> bool:
    """Moves what is ready into the bundle's directory; says whether anything was."""
    marker = staging / _READY
    if not marker.exists():
        return False
    for name in json.loads(marker.read_text(encoding="utf-8")):
        source, target = staging / name, directory / name
        if source.exists():
            target.parent.mkdir(exist_ok=True)
            os.replace(source, target)
    shutil.rmtree(staging)
    return True
