"""`python -m faceteer_trainer build-library --corpus DIR --bundle B`: from embeddings to a served library."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from faceteer_trainer.library.measure import BuildSettings
from faceteer_trainer.library.run import build_library
from faceteer_trainer.library.writing import MOST_UNLIKE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    defaults = BuildSettings()
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="embeddings, made by embed with the same encoder")
    add("--bundle", type=Path, required=True, help="whose SAE it is, and which gets the library")
    add("--out", type=Path, help="write the library to this file, and leave the bundle as it is")
    add("--work", type=Path, help="for activations while it runs; by default the bundle's directory")
    add("--examples", type=int, default=defaults.examples, help="strongest pictures for each feature")
    add("--per-quantile", type=int, default=defaults.per_quantile, help="pictures from each quarter")
    add("--common", type=int, default=defaults.common, help="features whose pairs are counted exactly")
    keep = "leave the SAE's own statistics, and its revision, as they are"
    add("--keep-statistics", action="store_true", help=keep)
    foreign = "pictures unlike those of the encoder and SAE are refused; go on, and mark the library"
    add("--accept-foreign", action="store_true", help=foreign)
    add("--seed", type=int, default=defaults.seed)
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=1, help="of the arithmetic on a CPU")


def run(arguments: argparse.Namespace) -> None:
    """Build, and say what was found."""
    a = arguments
    torch.set_num_threads(a.threads)
    settings = BuildSettings(examples=a.examples, per_quantile=a.per_quantile, common=a.common, seed=a.seed)
    found = build_library(a.corpus, a.bundle, settings, a.work, a.device, a.keep_statistics, a.out, a.accept_foreign)
    print(
        f"{found.library}: {found.alive:,} of {found.features:,} features fire on {found.pictures:,} pictures, "
        f"{found.l0:.1f} on each; {found.minutes:.1f} minutes"
    )
    if found.unlike > MOST_UNLIKE:
        print(
            f"{found.unlike:.0%} of the pictures are unlike those that encoder and SAE know: labels and scores of this "
            "library say what the encoder takes them for, not what they show. The library is marked."
        )
