"""A list of pictures that can be cut into pieces, whatever kind of files they come from."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from faceteer_trainer.errors import JobError

# With those that only some installations read: left out with a reason, rather than passed over.
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
# Captions are shown to people and supply vocabulary; a whole book beside a picture is a mistake.
CAPTION_BYTES, _CAPTION_LENGTH = 1 << 18, 4000


@dataclass
class Piece:
    """Pictures that are read together.

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
    # Files passed over as no pictures, by ending, as the last reading of the list found them.
    passed_over: Counter[str]

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
    text = data[:CAPTION_BYTES].decode("utf-8", "replace")
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


def files_fingerprint(root: Path, names: list[str]) -> str:
    """Of whole files' paths, sizes and times of change."""
    stats = ((name, (root / name).stat()) for name in names)
    try:
        return fingerprint_of((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    except OSError as error:
        raise JobError(f"{error.filename}: {error.strerror}") from None
