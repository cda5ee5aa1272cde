"""`python -m faceteer_trainer learn-novelty`: what tells pictures unlike a corpus, for an otherwise complete bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from faceteer_trainer.library.statistics import learn_novelty


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="embeddings of the bundle's own kind of pictures, made by embed")
    add("--bundle", type=Path, required=True, help="gets it; its SAE's revision changes")
    add("--device", default="cpu", help="cpu or cuda")


def run(arguments: argparse.Namespace) -> None:
    """Learn it, and say what is usual."""
    found = learn_novelty(arguments.bundle, arguments.corpus, arguments.device)
    print(
        f"{arguments.bundle}: its pictures are explained to {found.usual_explained_variance:.1%}; "
        f"above a score of {float(found.limit[0]):.3g} a picture is warned about"
    )
