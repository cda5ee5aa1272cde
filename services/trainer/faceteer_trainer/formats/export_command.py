"""`faceteer_trainer export-sae --sae DIR --to saelens --out DIR`.

Knows the options; each format has a module of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from faceteer_trainer.errors import JobError
from faceteer_trainer.formats import bundle_sae, dictionary_learning, published, saelens, sparsify
from faceteer_trainer.formats.import_command import FORMATS

_WRITERS = {
    "published": published.write,
    "saelens": saelens.write,
    "dictionary-learning": dictionary_learning.write,
    "sparsify": sparsify.write,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--sae", type=Path, help="a folder with cfg.json and sae_weights.safetensors")
    which.add_argument("--bundle", type=Path, help="a bundle, whose SAE is meant")
    parser.add_argument("--to", dest="format", choices=FORMATS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder; of the published format the file")


def run(arguments: argparse.Namespace) -> None:
    """Convert, and say where it is."""
    sae = bundle_sae.read(arguments.sae or arguments.bundle / "sae")
    try:
        print(_WRITERS[arguments.format](sae, arguments.out))
    except OSError as error:
        raise JobError(f"{arguments.out}: cannot be written ({error.strerror})") from None
