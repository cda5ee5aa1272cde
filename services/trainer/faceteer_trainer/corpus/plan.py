"""What an embed run will do, on disk: the source cut into shards once, so that a killed run can resume.

plan.json holds what must not change between runs, plan.jsonl a line a shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from faceteer_trainer.corpus.pictures import Piece, Source
from faceteer_trainer.errors import JobError
from faceteer_trainer.files import job_file

SETTINGS, TASKS = "plan.json", "plan.jsonl"
_FORMAT = 1


@dataclass(frozen=True)
class Fixed:
    """What every run into one folder must share, or its bytes would not be those of an unbroken run."""

    encoder_revision: str
    dtype: str
    shard_size: int
    batch: int
    thumbnails: int
    captions: str


@dataclass(frozen=True)
class Task:
    """One shard's worth of pictures: the unit of work.

    Attributes:
        number: of the shard.
        pieces: where its pictures are.
    """

    number: int
    pieces: list[Piece]

    @property
    def count(self) -> int:
        """Pictures, bad ones included."""
        return sum(piece.count for piece in self.pieces)


@dataclass(frozen=True)
class Plan:
    """An embed run's plan.

    Attributes:
        directory: of the corpus.
        counts: pictures of each shard, in order.
        offsets: where each task's line begins in plan.jsonl.
    """

    directory: Path
    counts: tuple[int, ...]
    offsets: tuple[int, ...]

    @classmethod
    def made(cls, directory: Path, source: Source, fixed: Fixed) -> Plan:
        """The plan in this folder, or a new one.

        Raises:
            JobError: the folder's plan is of other settings, or the source has changed since; the source is empty.
        """
        fingerprint = source.fingerprint()
        path = directory / SETTINGS
        if path.exists():
            return cls._kept(directory, fixed, fingerprint)
        counts, offsets, at = [], [], 0
        with job_file(directory / TASKS) as part, part.open("wb") as file:
            for number, pieces in enumerate(packed(source.pieces(), fixed.shard_size)):
                task = Task(number, pieces)
                line = json.dumps(asdict(task), separators=(",", ":")).encode() + b"\n"
                file.write(line)
                counts.append(task.count)
                offsets.append(at)
                at += len(line)
        if not counts:
            raise JobError(f"{source.root}: holds no pictures")
        settings = {"format": _FORMAT, "fixed": asdict(fixed), "source": source.description, "fingerprint": fingerprint}
        with job_file(path) as part:
            part.write_text(json.dumps({**settings, "counts": counts, "offsets": offsets}) + "\n", encoding="utf-8")
        return cls(directory, tuple(counts), tuple(offsets))

    @classmethod
    def _kept(cls, directory: Path, fixed: Fixed, fingerprint: str) -> Plan:
        path = directory / SETTINGS
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["format"] != _FORMAT:
                raise JobError(f"{path}: a format that this version does not read; choose another --out")
            before = Fixed(**kept["fixed"])
            counts, offsets = tuple(kept["counts"]), tuple(kept["offsets"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JobError(f"{path}: not readable ({error}); choose another --out") from None
        if before.encoder_revision != fixed.encoder_revision:
            raise JobError(
                f"{directory}: holds embeddings of encoder {before.encoder_revision}, but --bundle has encoder "
                f"{fixed.encoder_revision}; choose another --out"
            )
        for name, value in asdict(before).items():
            if value != asdict(fixed)[name]:
                option = f"--{name.replace('_', '-')}"
                raise JobError(f"{directory}: was begun with {option} {value}; use the same, or another --out")
        if kept["fingerprint"] != fingerprint:
            raise JobError(
                f"{directory}: was begun with other pictures ({kept['source']}), or files were added, removed or "
                "written to since; choose another --out"
            )
        return cls(directory, counts, offsets)

    def task(self, number: int) -> Task:
        """One shard's task, read from plan.jsonl."""
        with (self.directory / TASKS).open("rb") as file:
            file.seek(self.offsets[number])
            given = json.loads(file.readline())
        return Task(given["number"], [Piece(**piece) for piece in given["pieces"]])


def packed(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """Pieces in order, `size` pictures a group: cut where a group is full, joined where they share a file."""
    group: list[Piece] = []
    held = 0
    for piece in pieces:
        first, left = piece.first, piece.count
        while left:
            taken = min(left, size - held)
            if group and group[-1].file == piece.file:
                group[-1].count += taken
                group[-1].names += piece.names
            else:
                group.append(Piece(piece.file, first, taken, list(piece.names)))
            first, left, held = first + taken, left - taken, held + taken
            if held == size:
                yield group
                group, held = [], 0
    if group:
        yield group
