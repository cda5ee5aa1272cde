"""Pictures in tar files, as WebDataset lays them out: neighbours that share a name up to its first dot belong together.

Tars are read with the standard library, forwards, one member at a time; a piece starts
at a member's byte offset, so that nothing before it needs to be read.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from faceteer_trainer.corpus.pictures import (
    PICTURES,
    Entry,
    Piece,
    caption_of,
    caption_suffixes,
    files_fingerprint,
    printable,
)
from faceteer_trainer.errors import JobError

# Size of the largest picture accepted; a larger member is not even read.
_LARGEST = 20_000_000


class Archives:
    """One or many tar files, in order; .tar.gz too, at the price of unpacking from the start for every piece."""

    def __init__(self, root: Path, names: list[str], captions: str) -> None:
        self.root = root
        self.description = f"pictures in {len(names)} tar files of {root.name}"
        self._names = names
        self.passed_over: Counter[str] = Counter()
        self._captions = caption_suffixes(captions)

    def fingerprint(self) -> str:
        """Of every tar's path, size and time of change."""
        return files_fingerprint(self.root, self._names)

    def pieces(self) -> Iterator[Piece]:
        """One picture each. Reads every header, and skips the bytes of the pictures."""
        for name in self._names:
            with _opened(self.root / name, 0) as archive:
                for group in _groups(archive):
                    yield Piece(name, group[0].offset, 1)

    def entries(self, piece: Piece) -> Iterator[Entry]:
        """Picture and caption of `piece.count` groups, from the piece's byte offset on."""
        with _opened(self.root / piece.file, piece.first) as archive:
            for _, group in zip(range(piece.count), _groups(archive), strict=False):
                yield self._entry(piece.file, archive, group)

    def _entry(self, file: str, archive: tarfile.TarFile, group: list[tarfile.TarInfo]) -> Entry:
        picture = next(member for member in group if _is_picture(member.name))
        by_suffix = {_key(member.name)[1]: member for member in group}
        caption = ""
        for suffix in self._captions:
            if suffix in by_suffix and by_suffix[suffix].size < 1 << 20:
                caption = caption_of(suffix, _bytes_of(archive, by_suffix[suffix]))
                break
        name = printable(f"{file}/{picture.name}")
        if picture.size > _LARGEST:
            return Entry(name, caption, None, f"{picture.size} bytes are more than the {_LARGEST} that are taken")
        return Entry(name, caption, _bytes_of(archive, picture))


def _key(name: str) -> tuple[str, str]:
    """(directory and name up to the first dot, the rest in lower case), as WebDataset has it."""
    directory, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{directory}/{stem}", suffix.lower()


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES)


def _groups(archive: tarfile.TarFile) -> Iterator[list[tarfile.TarInfo]]:
    """Neighbours of one key with one picture among them; a second picture begins a group of its own."""
    group: list[tarfile.TarInfo] = []
    while (member := archive.next()) is not None:
        # The reader would otherwise remember every member of the file.
        archive.members.clear()  # type: ignore[attr-defined]
        if not member.isreg() or member.name.rpartition("/")[2].startswith("."):
            continue
        has_picture = any(_is_picture(other.name) for other in group)
        if group and (_key(member.name)[0] != _key(group[0].name)[0] or (has_picture and _is_picture(member.name))):
            if has_picture:
                yield group
            group = []
        group.append(member)
    # The reader mistakes a damaged header for the end of the file; a real end is a block of zeros, or nothing.
    file = cast(IO[bytes], archive.fileobj)
    file.seek(archive.offset)
    if file.read(512).strip(b"\0"):
        raise tarfile.ReadError("a damaged header")
    if any(_is_picture(other.name) for other in group):
        yield group


def _bytes_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    data = file.read() if file is not None else b""
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


@contextmanager
def _opened(path: Path, offset: int) -> Iterator[tarfile.TarFile]:
    try:
        with cast(IO[bytes], path.open("rb") if path.name.lower().endswith(".tar") else gzip.open(path)) as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                yield archive
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise JobError(f"{path}: not a whole tar file ({error}); fetch it again, or leave it out") from None
