"""`faceteer_trainer import-sae --from saelens --file DIR --out DIR`.

Knows the options; each format has a module of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from faceteer_runtime.bundle import Bundle, BundleError

from faceteer_trainer.errors import JobError
from faceteer_trainer.formats import bundle_sae, dictionary_learning, published, saelens, sparsify
from faceteer_trainer.formats.plain import PlainSae

FORMATS = ("published", "saelens", "dictionary-learning", "sparsify")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    parser.add_argument("--from", dest="format", choices=FORMATS, required=True)
    parser.add_argument("--file", type=Path, required=True, help="the file, or the folder that holds it")
    parser.add_argument("--out", type=Path, required=True, help="where the SAE goes, as a bundle holds it")
    parser.add_argument("--dtype", choices=("keep", "float32", "float16", "bfloat16", "int8"), default="keep")
    parser.add_argument("--bundle", type=Path, help="whose encoder it must fit")
    parser.add_argument("--allow-other-checksum", action="store_true", help="of the published file")


def run(arguments: argparse.Namespace) -> None:
    """Convert, and say what it is."""
    sae = read(arguments.format, arguments.file, any_checksum=arguments.allow_other_checksum)
    if arguments.bundle is not None:
        try:
            embed_dim = int(Bundle.open(arguments.bundle).part("encoder").facts["embed_dim"])
        except BundleError as error:
            raise JobError(str(error)) from None
        if embed_dim != sae.d_in:
            raise JobError(
                f"{arguments.file}: an SAE of embeddings of {sae.d_in} values, but {arguments.bundle}'s encoder makes "
                f"{embed_dim}; it was trained on another encoder"
            )
    kept = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    dtype = kept.get(sae.W_enc.dtype, "float32") if arguments.dtype == "keep" else arguments.dtype
    bundle_sae.write(sae, arguments.out, dtype)
    print(f"{arguments.out}: {sae.architecture}, {sae.d_sae:,} features of {sae.d_in} values, {dtype}")


def read(format: str, path: Path, *, any_checksum: bool = False) -> PlainSae:
    """An SAE in one of :data:`FORMATS`. Raises JobError."""
    if format == "published":
        return published.read(path, any_checksum=any_checksum)
    readers = {"saelens": saelens.read, "dictionary-learning": dictionary_learning.read, "sparsify": sparsify.read}
    return readers[format](path)
