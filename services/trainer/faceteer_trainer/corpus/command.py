"""`python -m faceteer_trainer embed`: a folder, tar shards or Parquet files of pictures to a corpus of embeddings.

It knows nothing of how pictures are read or embedded; it makes the plan, hands out its shards, and says how far it is.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from faceteer_trainer.corpus import machines
from faceteer_trainer.corpus.embed import Embedder, Made
from faceteer_trainer.corpus.folder import finish, first_reason, held, take_up
from faceteer_trainer.corpus.plan import Fixed, Plan
from faceteer_trainer.corpus.progress import Counted
from faceteer_trainer.corpus.shards import CorpusCard
from faceteer_trainer.corpus.sources import Source, open_source
from faceteer_trainer.errors import JobError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    parser.add_argument(
        "--images",
        required=True,
        metavar="PATH",
        help="a folder of pictures, of tar shards or of Parquet files; one such file; or a quoted pattern of several",
    )
    parser.add_argument("--bundle", type=Path, required=True, help="whose encoder makes the embeddings")
    parser.add_argument("--out", type=Path, required=True, help="folder for the corpus; a run that was killed goes on")
    parser.add_argument("--name", help="of the corpus, for people; the source's name by default")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the embeddings on disk")
    parser.add_argument("--shard-size", type=_positive, default=8192, metavar="N", help="pictures a shard (8192)")
    parser.add_argument("--batch", type=_positive, default=64, metavar="N", help="pictures at a time (64)")
    parser.add_argument(
        "--thumbnails",
        type=int,
        default=128,
        metavar="PIXELS",
        help="longest side of what is kept to show (128); 0: none",
    )
    parser.add_argument(
        "--captions",
        default="auto",
        metavar="NAME",
        help="auto: .txt, .caption or .json of the same name, or Parquet column caption or text; none; or another "
        "ending or column",
    )
    parser.add_argument("--device", default="cpu", help="where the encoder runs: cpu (default), cuda, cuda:1 ...")
    parser.add_argument(
        "--workers", type=_positive, metavar="N", help="threads, or with --ray workers; this machine's cores by default"
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="share the work by Ray Data: a cluster's address, or local")


def run(arguments: argparse.Namespace) -> None:
    """Embed, or go on embedding.

    Raises:
        JobError: see the message; what is done is kept.
    """
    if arguments.thumbnails < 0:
        raise JobError(f"--thumbnails is {arguments.thumbnails}; give a size in pixels, or 0 for none")
    out, images = Path(os.path.abspath(arguments.out)), os.path.abspath(arguments.images)
    source = open_source(images, arguments.captions)
    # What is written there would count as more pictures, or as changed ones.
    if os.path.isdir(images) and out.resolve().is_relative_to(source.root):
        raise JobError(f"--out {arguments.out} lies among the pictures in {source.root}; choose a folder outside")
    settings = {
        "bundle": os.path.abspath(arguments.bundle),
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        "thumbnails": arguments.thumbnails,
        "device": arguments.device,
    }
    workers = arguments.workers or machines.cores()
    with held(out):
        # With Ray this one only knows the revision and judges shards that are there.
        embedder = Embedder(**settings, threads=1 if arguments.ray else workers)
        try:
            card = _run(arguments, out, source, embedder, settings, workers, images)
        finally:
            embedder.close()
    rows = sum(shard.rows for shard in card.shards)
    bad = f", {card.n_bad} bad ones left out (see bad.jsonl)" if card.n_bad else ""
    print(f"{rows} pictures in {len(card.shards)} shards of {card.dtype} [{card.embed_dim}]{bad}: {arguments.out}")


def _run(
    arguments: argparse.Namespace,
    out: Path,
    source: Source,
    embedder: Embedder,
    settings: dict[str, Any],
    workers: int,
    images: str,
) -> CorpusCard:
    plan = Plan.made(
        out,
        source,
        Fixed(
            embedder.revision,
            arguments.dtype,
            arguments.shard_size,
            arguments.batch,
            arguments.thumbnails,
            arguments.captions,
        ),
    )
    take_up(out)
    card = CorpusCard(
        arguments.name or source.root.name,
        embedder.revision,
        embedder.embed_dim,
        arguments.dtype,
        (),
        source=source.description,
        complete=False,
    )
    made: dict[int, Made] = {}
    for number in range(len(plan.counts)):
        if (found := embedder.made(out, number)) is not None:
            made[number] = found
    left = [number for number in range(len(plan.counts)) if number not in made]
    if left:
        card.write(out)
    kept = sum(plan.counts[number] for number in made)
    with Counted("embed", sum(plan.counts), kept) as counted:
        if left and arguments.ray:

            def done(number: int, shard: Made) -> None:
                made[number] = shard
                counted.advance(plan.counts[number])

            machines.make_shards(
                plan,
                left,
                address=arguments.ray,
                workers=workers,
                images=images,
                captions=arguments.captions,
                embedder=settings,
                done=done,
            )
        else:
            for number in left:
                made[number] = embedder.make(source, plan.task(number), out, counted.advance)
    done_card = finish(out, card, [made[number] for number in range(len(plan.counts))])
    if not done_card.shards:
        raise JobError(f"{source.root}: not one of {done_card.n_bad} pictures could be read; {first_reason(out)}")
    return done_card


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number
