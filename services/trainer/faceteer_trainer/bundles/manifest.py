"""What to pull: a known bundle's list of files and where their authors publish them, or another bundle's bundle.json.

A digest that this project could not know is null; the first pull takes
it from the publisher's own record and writes it into the new bundle's bundle.json, which holds every later pull to it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from faceteer_trainer.errors import JobError

MANIFEST = "bundle.json"


@dataclass(frozen=True)
class Wanted:
    """One file to pull.

    Attributes:
        path: inside the bundle.
        part: it belongs to.
        repo, file, revision: where its author publishes it.
        sha256: what its content must be, or None where that is not known beforehand.
        size: in bytes, or None.
        about: its size as published, to estimate disk space where ``size`` is not known.
    """

    path: str
    part: str
    repo: str
    file: str
    revision: str
    sha256: str | None
    size: int | None
    about: int


@dataclass(frozen=True)
class Recipe:
    """A bundle to pull: its manifest without digests, and its files."""

    name: str
    description: str
    parts: dict[str, dict[str, Any]]
    licences: dict[str, str]
    files: tuple[Wanted, ...]


def known() -> list[str]:
    """Names of the bundles that can be pulled by name."""
    return sorted(entry.name.removesuffix(".json") for entry in files(__package__).joinpath("known").iterdir())


def read_recipe(name: str) -> Recipe:
    """The recipe of a known bundle's name, or of a path to a bundle.json.

    Raises:
        JobError: no such bundle, or a manifest that names no sources.
    """
    if name in known():
        text, where = files(__package__).joinpath("known", f"{name}.json").read_text(encoding="utf-8"), name
    else:
        path = Path(name) / MANIFEST if Path(name).is_dir() else Path(name)
        where = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError:
            raise JobError(
                f"{name!r} is neither a known bundle ({', '.join(known())}) nor a {MANIFEST} that can be read"
            ) from None
    try:
        given = json.loads(text)
        # A pulled bundle records the files as they were pulled; some are served in another form.
        entries = given.get("pulled") or given["files"]
        wanted = tuple(_wanted(entry, where) for entry in entries if entry.get("source"))
        recipe = Recipe(given["name"], given.get("description", ""), given["parts"], given.get("licences", {}), wanted)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError(f"{where}: not a manifest of a bundle ({type(error).__name__}: {error})") from None
    if not recipe.files:
        raise JobError(f"{where}: names no source to pull from; copy the bundle instead")
    return recipe


def _wanted(entry: dict[str, Any], where: str) -> Wanted:
    path = PurePosixPath(entry["path"])
    if path.is_absolute() or ".." in path.parts:
        raise JobError(f"{where}: a file's path must lie inside the bundle, not {entry['path']!r}")
    source = entry["source"]
    size = entry.get("size")
    return Wanted(
        entry["path"],
        entry["part"],
        source["repo"],
        source["file"],
        source.get("revision", "main"),
        source.get("sha256") or entry.get("sha256"),
        size,
        size or entry.get("about") or 100_000,
    )
