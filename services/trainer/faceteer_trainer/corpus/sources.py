"""Where pictures come from: a folder, tar shards or Parquet files, as one kind of list that can be cut into pieces.

It knows nothing of what a picture holds, nor of embeddings. No list of all pictures is ever held in memory; a folder is
listed directory by directory, in natural order (2 before 10), without following links to directories.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from faceteer_trainer.errors import JobError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TARS = (".tar", ".tar.gz", ".tgz")
PARQUET = (".parquet",)
# Captions are for people and for lists of words; a whole book beside a picture is a mistake.
_CAPTION_BYTES, _CAPTION_LENGTH = 1 << 18, 4000


@dataclass
class Piece:
    """Pictures that are read in one go.

    Attributes:
        file: relative to the source's root; empty for a folder.
        first: a tar's byte offset, or a Parquet file's row.
        count: pictures.
        names: of a folder's pictures, relative to its root.
    """

    file: str
    first: int
    count: int
    names: list[str] = field(default_factory=list)


class Entry(NamedTuple):
    """One picture as found: its file's bytes, or the path to read them from, or the reason why there is neither."""

    name: str
    caption: str
    data: bytes | Path | None
    reason: str = ""


class Source(Protocol):
    """A list of pictures in a fixed order."""

    root: Path
    description: str

    def fingerprint(self) -> str:
        """Changes when a file is added, taken away, renamed or written to."""

    def pieces(self) -> Iterator[Piece]:
        """All pictures in order; whoever asks may cut pieces, or join neighbours of one file."""

    def entries(self, piece: Piece) -> Iterator[Entry]:
        """A piece's pictures, `piece.count` of them."""


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key by which img2 comes before img10; ties are broken by the name itself."""
    parts = re.split(r"([0-9]+)", name)
    return (*((1, int(part)) if part.isdecimal() else (2, part.casefold()) for part in parts if part), (3, name))


def printable(text: str) -> str:
    """Text that UTF-8 can hold: file names may be any bytes."""
    return text.encode("utf-8", "replace").decode()


def caption_of(suffix: str, data: bytes) -> str:
    """The caption in a .txt, or in a .json file's "caption" or "text"; empty where there is none."""
    text = data[:_CAPTION_BYTES].decode("utf-8", "replace")
    if suffix == "json":
        try:
            facts = json.loads(text)
        except ValueError:
            return ""
        found = (facts.get("caption") or facts.get("text")) if isinstance(facts, dict) else None
        text = found if isinstance(found, str) else ""
    return printable(text.strip()[:_CAPTION_LENGTH])


def caption_suffixes(captions: str) -> tuple[str, ...]:
    """Which files beside a picture hold its caption: `captions` is auto, none, or a file name's ending."""
    if captions == "none":
        return ()
    return ("txt", "caption", "json") if captions == "auto" else (captions.removeprefix("."),)


def fingerprint_of(facts: Iterable[tuple[object, ...]]) -> str:
    """A digest of facts about files, in order."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(json.dumps(fact).encode() + b"\n")
    return digest.hexdigest()[:32]


class Folder:
    """Pictures in a folder and the folders in it; a caption may lie beside each, in a file of the same name."""

    def __init__(self, root: Path, captions: str) -> None:
        self.root = root
        self.description = f"pictures in folder {root.name}"
        self._captions = caption_suffixes(captions)

    def fingerprint(self) -> str:
        """Of every picture's and caption's path, size and time of change."""
        return fingerprint_of(
            (name, *((stat.st_size, stat.st_mtime_ns) for stat in (entry.stat() for entry in files)))
            for name, files in self._walk(self.root, "")
        )

    def pieces(self) -> Iterator[Piece]:
        """One picture each."""
        for name, _ in self._walk(self.root, ""):
            yield Piece("", 0, 1, [name])

    def entries(self, piece: Piece) -> Iterator[Entry]:
        """Paths; whoever decodes reads them."""
        for name in piece.names:
            path = self.root / name
            caption = ""
            for suffix in self._captions:
                with contextlib.suppress(OSError), path.with_suffix(f".{suffix}").open("rb") as file:
                    caption = caption_of(suffix, file.read(_CAPTION_BYTES))
                    break
            yield Entry(printable(name), caption, path)

    def _walk(self, directory: Path, prefix: str) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
        """Every picture's relative path, with its own directory entry and its captions'."""
        found = _listed(directory)
        by_name = {entry.name: entry for entry in found}
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(directory / entry.name, f"{prefix}{entry.name}/")
            elif entry.name.lower().endswith(PICTURES) and entry.is_file():
                stem = entry.name.rsplit(".", 1)[0]
                beside = [by_name[f"{stem}.{end}"] for end in self._captions if f"{stem}.{end}" in by_name]
                yield prefix + entry.name, [entry, *beside]


def open_source(images: str, captions: str = "auto") -> Source:
    """What `--images` names: a folder of pictures, tars or Parquet files, one such file, or a pattern of several.

    Raises:
        JobError: nothing there, or nothing that holds pictures.
    """
    from faceteer_trainer.corpus.archives import Archives
    from faceteer_trainer.corpus.tables import Tables

    path = Path(images)
    if path.is_dir():
        kind = _first_kind(path)
        if kind is PICTURES:
            return Folder(path.resolve(), captions)
        if kind is None:
            raise JobError(
                f"{images}: holds no pictures ({', '.join(end[1:] for end in PICTURES)}), no tar and no Parquet files; "
                "name the folder that does"
            )
        root, files = path.resolve(), _files_below(path, kind)
    else:
        found = [path] if path.exists() else [Path(name) for name in glob.glob(images, recursive=True)]
        if not found:
            raise JobError(f"{images}: no such folder or file")
        files = sorted((file.resolve() for file in found), key=lambda file: natural(str(file)))
        kinds = {_kind_of(file.name) for file in files}
        kind = kinds.pop()
        if kinds or kind not in (TARS, PARQUET):
            raise JobError(f"{images}: must be a folder, or tar files, or Parquet files, and not several kinds at once")
        root = Path(os.path.commonpath([file.parent for file in files]))
    names = [file.relative_to(root).as_posix() for file in files]
    return Archives(root, names, captions) if kind is TARS else Tables(root, names, captions)


def _kind_of(name: str) -> tuple[str, ...] | None:
    return next((kind for kind in (PICTURES, TARS, PARQUET) if name.lower().endswith(kind)), None)


def _listed(directory: Path) -> list[os.DirEntry[str]]:
    """A directory's entries in natural order, without hidden ones."""
    try:
        with os.scandir(directory) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: natural(entry.name))
    except OSError as error:
        raise JobError(f"{directory}: could not be listed ({error.strerror})") from None


def _first_kind(directory: Path) -> tuple[str, ...] | None:
    """Of the first file that is of any kind: files of other kinds in that folder are left alone."""
    entries = _listed(directory)
    for entry in entries:
        if entry.is_file() and (kind := _kind_of(entry.name)):
            return kind
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and (kind := _first_kind(directory / entry.name)):
            return kind
    return None


def _files_below(directory: Path, kind: tuple[str, ...]) -> list[Path]:
    found: list[Path] = []
    for entry in _listed(directory.resolve()):
        if entry.is_dir(follow_symlinks=False):
            found += _files_below(directory.resolve() / entry.name, kind)
        elif entry.is_file() and _kind_of(entry.name) == kind:
            found.append(directory.resolve() / entry.name)
    return found


def files_fingerprint(root: Path, names: list[str]) -> str:
    """Of whole files' paths, sizes and times of change."""
    stats = ((name, (root / name).stat()) for name in names)
    try:
        return fingerprint_of((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    except OSError as error:
        raise JobError(f"{error.filename}: {error.strerror}") from None
