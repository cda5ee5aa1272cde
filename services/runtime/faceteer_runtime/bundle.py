"""Bundles on disk: opening, sealing and verifying (docs/bundles.md).

Only ``bundle.json`` is read; the parts' files are hashed, and belong to their services.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path, PurePosixPath
from typing import Any

from faceteer_runtime.files import write_json

FORMAT = 1
MANIFEST = "bundle.json"
# Outside the parts: pictures that the bundle understands, to try it with.
EXAMPLES = "examples"
# part -> the fact that names another part's revision -> that part
DEPENDENCIES = {
    "sae": {"encoder_revision": "encoder"},
    "generator": {"encoder_revision": "encoder"},
    "library": {"sae_revision": "sae"},
}
# The files that SQLite keeps beside an open database.
_TRANSIENT = ("-wal", "-shm", "-journal")


class BundleError(Exception):
    """A bundle that cannot be used; one sentence says which file or part, and why."""


@dataclass(frozen=True)
class BundlePart:
    """One part: ``revision`` (16 hexadecimal digits), ``path`` of its directory, ``facts``: its bundle.json entry."""

    name: str
    revision: str
    path: Path
    facts: dict[str, Any]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; its parts fit each other."""

    name: str
    directory: Path
    description: str = ""
    parts: Mapping[str, BundlePart] = dataclass_field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Reads ``bundle.json`` and checks that listed files exist with their sizes and that the parts fit each other.

        Digests are not computed (see :func:`verify`), so opening costs no more than a few stats.

        Raises:
            BundleError: no such bundle, bad JSON, an unknown format, a missing file, parts that do not fit.
        """
        directory = Path(path)
        manifest = _read_manifest(directory)
        if manifest.get("format") != FORMAT:
            raise BundleError(
                f"{directory / MANIFEST}: format {manifest.get('format')!r} is unknown (this version reads {FORMAT})"
            )
        name = manifest.get("name")
        if not isinstance(name, str) or not name:
            raise BundleError(f'{directory / MANIFEST}: "name" must be a text that is not empty')
        parts: dict[str, BundlePart] = {}
        for part, facts in _parts_of(manifest, directory).items():
            revision = facts.get("revision")
            if not isinstance(revision, str) or not revision:
                raise BundleError(f"{directory / MANIFEST}: part {part!r} has no revision; seal the bundle again")
            if not (directory / part).is_dir():
                raise BundleError(f"{directory}: part {part!r} is in {MANIFEST}, but its directory is missing")
            parts[part] = BundlePart(part, revision, directory / part, dict(facts))
        for entry in _files_of(manifest, directory):
            file = directory / entry["path"]
            try:
                size = file.stat().st_size
            except OSError:
                raise BundleError(f"{file}: listed in {MANIFEST}, but missing; pull the bundle again") from None
            # A library may be written to while it serves (labels); weights may not.
            if entry.get("part") != "library" and size != entry["size"]:
                raise BundleError(f"{file}: {size} bytes, but {MANIFEST} says {entry['size']}; pull the bundle again")
        _check_fit(parts, directory)
        return cls(name, directory, str(manifest.get("description", "")), parts)

    @classmethod
    def none(cls) -> Bundle:
        """The bundle of a service that has none: no name, no parts."""
        return cls("", Path())

    def part(self, name: str) -> BundlePart:
        """The part called ``name``.

        Raises:
            BundleError: the bundle has no such part.
        """
        try:
            return self.parts[name]
        except KeyError:
            known = ", ".join(sorted(self.parts)) or "none"
            raise BundleError(f"bundle {self.name!r} has no part {name!r} (it has: {known})") from None

    @property
    def example(self) -> str:
        """The first picture in ``examples/``, by its path in the bundle; empty where there is none."""
        pictures = sorted(path.name for path in (self.directory / EXAMPLES).glob("*.*")) if self.name else []
        return f"{EXAMPLES}/{pictures[0]}" if pictures else ""

    def has_part(self, name: str) -> bool:
        """Whether the bundle has a part called ``name``."""
        return name in self.parts


def seal(directory: Path | str, manifest: Mapping[str, Any] | None = None) -> Path:
    """Computes digests and revisions of every part's files and writes ``bundle.json``.

    Args:
        directory: holds one directory for each part of the manifest.
        manifest: name, description, parts (facts without revisions), licences; optionally files whose ``source`` is
            kept. By default the ``bundle.json`` that is there already.

    Returns:
        The path of ``bundle.json``. References between parts (``encoder_revision``, ``sae_revision``) are filled in.

    Raises:
        BundleError: a part without files.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory) if manifest is None else manifest
    sources = {entry["path"]: entry.get("source") for entry in _files_of(manifest, directory)}
    files: list[dict[str, Any]] = []
    parts: dict[str, dict[str, Any]] = {}
    for part, facts in _parts_of(manifest, directory).items():
        entries = []
        for path in _walk(directory, part):
            file = directory / path
            entries.append(
                {
                    "path": path,
                    "sha256": _sha256(file),
                    "size": file.stat().st_size,
                    "part": part,
                    "source": sources.get(path),
                }
            )
        if not entries:
            raise BundleError(f"{directory / part}: part {part!r} is in the manifest, but holds no files")
        parts[part] = {**facts, "revision": _revision(entries)}
        files += entries
    for part, references in DEPENDENCIES.items():
        for fact, other in references.items():
            if part in parts and other in parts:
                parts[part][fact] = parts[other]["revision"]
    sealed = {
        "name": "",
        "description": "",
        "licences": {},
        **manifest,
        "format": FORMAT,
        "parts": parts,
        "files": files,
    }
    order = ("format", "name", "description", "parts", "files", "licences")
    ordered = {key: sealed[key] for key in order} | sealed
    write_json(directory / MANIFEST, ordered)
    return directory / MANIFEST


def verify(directory: Path | str) -> Bundle:
    """Opens a bundle, hashes every file, and compares digests and revisions with ``bundle.json``.

    Raises:
        BundleError: the first file or part that differs.
    """
    bundle = Bundle.open(directory)
    entries = _files_of(_read_manifest(bundle.directory), bundle.directory)
    for entry in entries:
        digest = _sha256(bundle.directory / entry["path"])
        if digest != entry["sha256"]:
            raise BundleError(f"{bundle.directory / entry['path']}: its SHA-256 is not the one in {MANIFEST}")
    for name, part in bundle.parts.items():
        if _revision([entry for entry in entries if entry.get("part") == name]) != part.revision:
            raise BundleError(f"{bundle.directory}: part {name!r} does not have the revision that {MANIFEST} gives it")
    return bundle


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{directory}: no bundle here ({MANIFEST} is missing)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise BundleError(f"{path}: not JSON (line {error.lineno}: {error.msg})") from None
    if not isinstance(manifest, dict):
        raise BundleError(f"{path}: must be a JSON object")
    return manifest


def _parts_of(manifest: Mapping[str, Any], directory: Path) -> dict[str, dict[str, Any]]:
    parts = manifest.get("parts")
    if not isinstance(parts, dict) or not parts or not all(isinstance(facts, dict) for facts in parts.values()):
        raise BundleError(f'{directory / MANIFEST}: "parts" must name at least one part')
    for part in parts:
        if part != PurePosixPath(part).name or part in (".", ".."):
            raise BundleError(f"{directory / MANIFEST}: {part!r} is not the name of a part")
    return parts


def _files_of(manifest: Mapping[str, Any], directory: Path) -> list[dict[str, Any]]:
    files = manifest.get("files", [])
    if not isinstance(files, list):
        raise BundleError(f'{directory / MANIFEST}: "files" must be a list')
    for entry in files:
        path = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(path, str) or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise BundleError(f'{directory / MANIFEST}: a file\'s "path" must lie inside the bundle, not {path!r}')
        if not isinstance(entry.get("sha256"), str) or not isinstance(entry.get("size"), int):
            raise BundleError(f'{directory / MANIFEST}: {path!r} needs "sha256" and "size"; seal the bundle again')
    return files


def _walk(directory: Path, part: str) -> Iterator[str]:
    for file in sorted((directory / part).rglob("*")):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_TRANSIENT):
            yield file.relative_to(directory).as_posix()


def _check_fit(parts: Mapping[str, BundlePart], directory: Path) -> None:
    for part, references in DEPENDENCIES.items():
        for fact, other in references.items():
            if part not in parts or other not in parts:
                continue
            wanted, present = parts[part].facts.get(fact), parts[other].revision
            if wanted != present:
                raise BundleError(
                    f"{directory}: the {part} was made for {other} revision {wanted}, but the bundle holds {present}"
                )


def _revision(entries: list[dict[str, Any]]) -> str:
    lines = sorted(f"{entry['sha256']}  {entry['path']}\n" for entry in entries)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror})") from None
