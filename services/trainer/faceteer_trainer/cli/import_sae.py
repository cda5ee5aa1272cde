"""`python -m faceteer_trainer import-sae --from saelens --file DIR --out DIR`: any published format to a bundle's."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from faceteer_runtime.bundle import Bundle
from faceteer_sae.statistics import FILE as STATISTICS
from faceteer_sae.weights import SaeWeights, write_weights

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.files import locked, writing
from faceteer_trainer.formats.measuring import measure_import
from faceteer_trainer.formats.registry import FORMATS, read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    parser.add_argument("--from", dest="format", choices=FORMATS, required=True)
    parser.add_argument("--file", type=Path, required=True, help="the file, or the folder that holds it")
    parser.add_argument("--out", type=Path, required=True, help="where the SAE goes, as a bundle holds it")
    parser.add_argument("--dtype", choices=("keep", "float32", "float16", "bfloat16", "int8"), default="keep")
    parser.add_argument("--bundle", type=Path, help="whose encoder it must fit; its revision is recorded")
    parser.add_argument("--corpus", type=Path, help="embeddings to measure its features on: without, no SCALED units")
    parser.add_argument("--statistics-rows", type=int, default=100_000, help="of the corpus (100000)")
    parser.add_argument("--allow-other-checksum", action="store_true", help="of the published file")
    parser.add_argument("--activation-scale", type=float, metavar="S", help="saelens, expected_average_only_in: the "
        "factor that the training's input was multiplied with")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Convert, measure where a corpus is given, and say what it is."""
    scale = arguments.activation_scale
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise JobError(f"--activation-scale is {scale}; it must be above 0")
    if scale is not None and arguments.format != "saelens":
        raise JobError("--activation-scale goes with --from saelens only; leave it out")
    if arguments.statistics_rows < 1:
        raise JobError(f"--statistics-rows is {arguments.statistics_rows}; it must be above 0")
    sae = read(arguments.format, arguments.file, any_checksum=arguments.allow_other_checksum, activation_scale=scale)
    revision = None if arguments.bundle is None else _encoder_of(arguments.bundle, sae, arguments.file)
    corpus = None
    if arguments.corpus is not None:
        corpus = EmbeddingCorpus.open(arguments.corpus, encoder_revision=revision)
        if corpus.embed_dim != sae.d_in:
            raise JobError(
                f"{arguments.corpus}: embeddings of {corpus.embed_dim} values, but {arguments.file} takes {sae.d_in}"
            )
        revision = corpus.encoder_revision
    metadata: dict[str, Any] = {
        **sae.metadata,
        "imported_from": {"format": arguments.format, "file": arguments.file.name},
    }
    if revision is not None:
        metadata["encoder_revision"] = revision
    kept = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    dtype = kept.get(sae.W_enc.dtype, "float32") if arguments.dtype == "keep" else arguments.dtype
    with locked(arguments.out), writing(arguments.out):
        # Figures measured on another SAE do not apply to this one.
        (arguments.out / STATISTICS).unlink(missing_ok=True)
        write_weights(arguments.out, replace(sae, metadata=metadata), dtype)
        print(f"{arguments.out}: {sae.architecture}, {sae.d_sae:,} features of {sae.d_in} values, {dtype}")
        if corpus is not None:
            del sae
            print(measure_import(arguments.out, corpus, arguments.statistics_rows))


def _encoder_of(directory: Path, sae: SaeWeights, file: Path) -> str:
    """The revision of a bundle's encoder, which must make embeddings of the SAE's length."""
    encoder = Bundle.open(directory).part("encoder")
    embed_dim = int(encoder.facts["embed_dim"])
    if embed_dim != sae.d_in:
        raise JobError(
            f"{file}: an SAE of embeddings of {sae.d_in} values, but {directory}'s encoder makes {embed_dim}; it was "
            "trained on another encoder"
        )
    return encoder.revision
