"""Where pictures come from: a folder, tar shards or Parquet files.

No list of all pictures is ever held in memory; a folder is listed directory by directory, in natural order (2 before
10), without following links to directories.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from faceteer_trainer.corpus.archives import Archives
from faceteer_trainer.corpus.pictures import (
    CAPTION_BYTES,
    PICTURES,
    Entry,
    Piece,
    Source,
    caption_of,
    caption_suffixes,
    fingerprint_of,
    natural,
    printable,
)
from faceteer_trainer.corpus.tables import Tables
from faceteer_trainer.errors import JobError

TARS = (".tar", ".tar.gz", ".tgz")
PARQUET = (".parquet",)


class Folder:
    """Pictures in a folder and the folders in it; a caption may lie beside each, in a file of the same name."""

    def __init__(self, root: Path, captions: str) -> None:
        self.root = root
        self.description = f"pictures in folder {root.name}"
        self._captions = caption_suffixes(captions)
        self.passed_over: Counter[str] = Counter()

    def fingerprint(self) -> str:
        """Of every picture's and caption's path, size and time of change."""
        self.passed_over.clear()
        return fingerprint_of(
            (name, *((stat.st_size, stat.st_mtime_ns) for stat in (entry.stat() for entry in files)))
            for name, files in self._walk(self.root, "")
        )

    def pieces(self) -> Iterator[Piece]:
        """One picture each."""
        self.passed_over.clear()
        for name, _ in self._walk(self.root, ""):
            yield Piece("", 0, 1, [name])

    def entries(self, piece: Piece) -> Iterator[Entry]:
        """Paths; whoever decodes reads them."""
        for name in piece.names:
            path = self.root / name
            caption = ""
            for suffix in self._captions:
                with contextlib.suppress(OSError), path.with_suffix(f".{suffix}").open("rb") as file:
                    caption = caption_of(suffix, file.read(CAPTION_BYTES))
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
            elif (ending := os.path.splitext(entry.name)[1].lower()).removeprefix(".") not in self._captions:
                self.passed_over[ending or "no ending"] += 1


def open_source(images: str, captions: str = "auto") -> Source:
    """What `--images` names: a folder of pictures, tars or Parquet files, one such file, or a pattern of several.

    Raises:
        JobError: nothing there, or nothing that holds pictures.
    """
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
