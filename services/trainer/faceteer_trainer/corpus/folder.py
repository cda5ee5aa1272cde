"""The folder that an embed run writes into: held by one run at a time, begun, taken up again, finished.

It knows nothing of pictures or models.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from faceteer_trainer.corpus.embed import Made, bad_name, pictures_name
from faceteer_trainer.corpus.plan import SETTINGS
from faceteer_trainer.corpus.shards import CARD, CorpusCard, Shard, shard_name, whole_file
from faceteer_trainer.errors import JobError

LOCK = ".embed.lock"
BAD = "bad.jsonl"


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Make the folder where it does not exist, and keep other runs out of it; a dead run's lock does not count.

    Raises:
        JobError: another run writes into it, it cannot be made, or it holds a corpus that embed has not made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise JobError(f"{directory}: cannot be written to ({error.strerror}); choose another --out") from None
    try:
        try:
            # The system lets go of it when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(lock, 32).decode().strip() or "unknown"
            raise JobError(
                f"{directory}: another run (process {pid}) is writing into it; wait for it to end, or choose another "
                "--out"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        if (directory / CARD).exists() and not (directory / SETTINGS).exists():
            raise JobError(f"{directory}: holds a corpus that embed has not made; choose another --out")
        yield
        os.ftruncate(lock, 0)
    finally:
        os.close(lock)


def take_up(directory: Path) -> None:
    """Clear away what a run that was killed left half-written, and undo a finished run's last step."""
    for name in ("embeds-*", "pictures-*", "bad*", "plan.json*", CARD):
        for part in directory.glob(f"{name}.part"):
            part.unlink()
    with contextlib.suppress(FileNotFoundError):
        by_shard: dict[int, list[bytes]] = {}
        for line in (directory / BAD).read_bytes().splitlines(keepends=True):
            by_shard.setdefault(json.loads(line)["shard"], []).append(line)
        for number, lines in by_shard.items():
            with whole_file(directory / bad_name(number)) as file:
                file.writelines(lines)
        (directory / BAD).unlink()


def finish(directory: Path, card: CorpusCard, shards: Sequence[Made]) -> CorpusCard:
    """Write bad.jsonl and corpus.json of all shards; shards of bad pictures alone are left out."""
    with whole_file(directory / BAD) as file:
        for number in range(len(shards)):
            with contextlib.suppress(FileNotFoundError):
                file.write((directory / bad_name(number)).read_bytes())
    kept = tuple(
        Shard(shard_name(number), made.rows, pictures_name(number)) for number, made in enumerate(shards) if made.rows
    )
    done = CorpusCard(
        card.name,
        card.encoder_revision,
        card.embed_dim,
        card.dtype,
        kept,
        sum(made.n_bad for made in shards),
        card.source,
        complete=bool(kept),
    )
    done.write(directory)
    for number in range(len(shards)):
        (directory / bad_name(number)).unlink(missing_ok=True)
    return done


def first_reason(directory: Path) -> str:
    """Why the first bad picture was left out."""
    with (directory / BAD).open(encoding="utf-8") as file:
        bad = json.loads(file.readline())
    return f"{bad['name']}: {bad['reason']}"
