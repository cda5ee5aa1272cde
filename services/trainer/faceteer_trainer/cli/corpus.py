"""`python -m faceteer_trainer embed`: a folder, tar shards or Parquet files of pictures to a corpus of embeddings."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from faceteer_trainer.cli.jobs import positive
from faceteer_trainer.corpus.embed import EmbedderSettings
from faceteer_trainer.corpus.run import EmbedSettings, embed_corpus
from faceteer_trainer.errors import JobError

# Reasons for leaving pictures out that are printed; bad.jsonl has all.
_MOST_REASONS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    add = parser.add_argument
    images = "a folder of pictures, of tar shards or of Parquet files; one such file; or a quoted pattern of several"
    add("--images", required=True, metavar="PATH", help=images)
    add("--bundle", type=Path, required=True, help="whose encoder makes the embeddings")
    add("--out", type=Path, required=True, help="folder for the corpus; a killed run resumes")
    add("--name", help="of the corpus, for people; the source's name by default")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of the embeddings on disk")
    add("--shard-size", type=positive, default=8192, metavar="N", help="pictures a shard (8192)")
    add("--batch", type=positive, default=64, metavar="N", help="pictures at a time (64)")
    thumbnails = "longest side of what is kept to show (128); 0: none"
    add("--thumbnails", type=int, default=128, metavar="PIXELS", help=thumbnails)
    captions = "auto: .txt, .caption or .json of the same name, or Parquet column caption or text; none; or another "
    add("--captions", default="auto", metavar="NAME", help=captions + "ending or column")
    add("--device", default="cpu", help="where the encoder runs: cpu (default), cuda, cuda:1 ...")
    workers = "threads, or with --ray workers; this machine's cores by default"
    add("--workers", type=positive, metavar="N", help=workers)
    add("--ray", metavar="ADDRESS", help="share the work by Ray Data: a cluster's address, or local")


def run(arguments: argparse.Namespace) -> None:
    """Embed, or resume."""
    a = arguments
    if a.thumbnails < 0:
        raise JobError(f"--thumbnails is {a.thumbnails}; give a size in pixels, or 0 for none")
    embedder = EmbedderSettings(os.path.abspath(a.bundle), a.dtype, a.batch, a.thumbnails, a.device)
    workers = a.workers or len(os.sched_getaffinity(0))
    settings = EmbedSettings(embedder, a.shard_size, a.captions, a.name, workers, a.ray)
    card, reasons, passed_over = embed_corpus(a.images, a.out, settings)
    rows = sum(shard.rows for shard in card.shards)
    bad = f", {card.n_bad} bad ones left out (see bad.jsonl)" if card.n_bad else ""
    print(f"{rows} pictures in {len(card.shards)} shards of {card.dtype} [{card.embed_dim}]{bad}: {a.out}")
    for reason, count in reasons.most_common(_MOST_REASONS):
        print(f"  left out {count}: {reason}")
    if passed_over:
        kinds = ", ".join(f"{count} {ending}" for ending, count in passed_over.most_common())
        print(f"  passed over {passed_over.total()} files that are no pictures: {kinds}")
