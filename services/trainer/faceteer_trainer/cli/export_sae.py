"""`python -m faceteer_trainer export-sae --sae DIR --to saelens --out DIR`: a bundle's SAE to a published format."""

from __future__ import annotations

import argparse
from pathlib import Path

from faceteer_sae.weights import read_weights

from faceteer_trainer.files import writing
from faceteer_trainer.formats.registry import FORMATS, WRITERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--sae", type=Path, help="a folder with cfg.json and sae_weights.safetensors")
    which.add_argument("--bundle", type=Path, help="a bundle, whose SAE is meant")
    parser.add_argument("--to", dest="format", choices=FORMATS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder; of the published format the file")


def run(arguments: argparse.Namespace) -> None:
    """Convert, and say where it is."""
    sae = read_weights(arguments.sae or arguments.bundle / "sae")
    with writing(arguments.out):
        print(WRITERS[arguments.format](sae, arguments.out))
