"""The embed job: makes or resumes the plan, has its shards made, here or by Ray's workers, and finishes the corpus."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from faceteer_trainer.corpus import ray_workers
from faceteer_trainer.corpus.embed import Embedder, EmbedderSettings, Made, bad_name, pictures_name
from faceteer_trainer.corpus.pictures import Source
from faceteer_trainer.corpus.plan import SETTINGS, Fixed, Plan
from faceteer_trainer.corpus.shards import CARD, CorpusCard, Shard, shard_name
from faceteer_trainer.corpus.sources import open_source
from faceteer_trainer.errors import JobError
from faceteer_trainer.files import job_file, locked
from faceteer_trainer.progress import Progress

BAD = "bad.jsonl"


@dataclass(frozen=True)
class EmbedSettings:
    """How a corpus is made.

    Attributes:
        embedder: what makes a shard.
        shard_size: pictures a shard.
        captions: where they are, as `open_source` takes it.
        name: of the corpus, for people; the source's by default.
        workers: threads, or Ray's workers.
        ray: address of a Ray cluster, or "local"; None for this process alone.
    """

    embedder: EmbedderSettings
    shard_size: int = 8192
    captions: str = "auto"
    name: str | None = None
    workers: int = 1
    ray: str | None = None


class Embedded(NamedTuple):
    """What embedding made of a source.

    Attributes:
        card: of the corpus.
        reasons: why pictures were left out, and how many for each.
        passed_over: files that are no pictures, by ending.
    """

    card: CorpusCard
    reasons: Counter[str]
    passed_over: Counter[str]


def embed_corpus(images: str, out: Path, settings: EmbedSettings) -> Embedded:
    """Embeds what `images` names into `out`, or resumes where an earlier run stopped.

    Raises:
        JobError: see the message; what is done is kept.
    """
    out, images = Path(os.path.abspath(out)), os.path.abspath(images)
    source = open_source(images, settings.captions)
    # Files written there would count as additional or changed pictures.
    if os.path.isdir(images) and out.resolve().is_relative_to(source.root):
        raise JobError(f"--out {out} lies among the pictures in {source.root}; choose a folder outside")
    with locked(out):
        if (out / CARD).exists() and not (out / SETTINGS).exists():
            raise JobError(f"{out}: holds a corpus that embed has not made; choose another --out")
        # With Ray this process only needs the revision, to check existing shards.
        with contextlib.closing(Embedder(settings.embedder, 1 if settings.ray else settings.workers)) as embedder:
            card = _embed(images, out, source, embedder, settings)
        bad = (out / BAD).read_text(encoding="utf-8").splitlines()
        return Embedded(card, Counter(json.loads(line)["reason"] for line in bad), source.passed_over)


def _embed(images: str, out: Path, source: Source, embedder: Embedder, settings: EmbedSettings) -> CorpusCard:
    chosen = settings.embedder
    fixed = Fixed(
        embedder.revision, chosen.dtype, settings.shard_size, chosen.batch, chosen.thumbnails, settings.captions
    )
    plan = Plan.made(out, source, fixed)
    _take_up(out)
    name, revision, d = settings.name or source.root.name, embedder.revision, embedder.embed_dim
    card = CorpusCard(name, revision, d, chosen.dtype, (), source=source.description, complete=False)
    numbers = range(len(plan.counts))
    made = {number: found for number in numbers if (found := embedder.made(out, number)) is not None}
    left = [number for number in numbers if number not in made]
    if left:
        card.write(out)
    done = sum(plan.counts[number] for number in made)
    with Progress() as progress:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress("embed", done, sum(plan.counts))

        def add(number: int, shard: Made) -> None:
            made[number] = shard
            advance(plan.counts[number])

        advance(0)
        if left and settings.ray:
            ray_workers.make_shards(plan, left, images, settings.captions, chosen, settings.ray, settings.workers, add)
        else:
            for number in left:
                made[number] = embedder.make(source, plan.task(number), out, advance)
    finished = _finish(out, card, [made[number] for number in numbers])
    if not finished.shards:
        bad = json.loads((out / BAD).read_text(encoding="utf-8").splitlines()[0])
        raise JobError(
            f"{source.root}: not one of {finished.n_bad} pictures could be read; {bad['name']}: {bad['reason']}"
        )
    return finished


def _take_up(directory: Path) -> None:
    """Clear away what a run that was killed left half-written, and undo a finished run's last step."""
    for name in ("embeds-*", "pictures-*", "bad*", "plan.json*", CARD):
        for part in directory.glob(f"{name}.part"):
            part.unlink()
    with contextlib.suppress(FileNotFoundError):
        by_shard: dict[int, list[bytes]] = {}
        for line in (directory / BAD).read_bytes().splitlines(keepends=True):
            by_shard.setdefault(json.loads(line)["shard"], []).append(line)
        for number, lines in by_shard.items():
            with job_file(directory / bad_name(number)) as part:
                part.write_bytes(b"".join(lines))
        (directory / BAD).unlink()


def _finish(directory: Path, card: CorpusCard, shards: Sequence[Made]) -> CorpusCard:
    """Write bad.jsonl and corpus.json of all shards; shards of bad pictures alone are left out."""
    bad = [path for number in range(len(shards)) if (path := directory / bad_name(number)).exists()]
    with job_file(directory / BAD) as part, part.open("wb") as file:
        for path in bad:
            file.write(path.read_bytes())
    kept = tuple(
        Shard(shard_name(number), made.rows, pictures_name(number)) for number, made in enumerate(shards) if made.rows
    )
    n_bad = sum(made.n_bad for made in shards)
    finished = replace(card, shards=kept, n_bad=n_bad, complete=bool(kept))
    finished.write(directory)
    for path in bad:
        path.unlink()
    return finished
