"""`faceteer_trainer build-library --corpus DIR --bundle B`: from embeddings to the library that the bundle serves.

Knows the options, the lock and the order of things that name each other's revisions, and nothing of the reckoning.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from faceteer_runtime import bundle as bundle_format
from faceteer_runtime.bundle import Bundle, BundleError
from faceteer_sae.model import SparseAutoencoder
from rich.console import Console

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.library.activations import ActivationStore
from faceteer_trainer.library.build import BuildSettings, encode_corpus, measure, write_library
from faceteer_trainer.library.statistics import put_in_place, stage_sae
from faceteer_trainer.library.steps import Steps
from faceteer_trainer.locks import locked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    defaults = BuildSettings()
    parser.add_argument("--corpus", type=Path, required=True, help="embeddings, made by embed with the same encoder")
    parser.add_argument("--bundle", type=Path, required=True, help="whose SAE it is, and which gets the library")
    parser.add_argument("--work", type=Path, help="for activations while it runs; by default in the bundle's directory")
    parser.add_argument("--examples", type=int, default=defaults.examples, help="strongest pictures for each feature")
    parser.add_argument("--per-quantile", type=int, default=defaults.per_quantile, help="pictures from each quarter")
    parser.add_argument("--common", type=int, default=defaults.common, help="features whose pairs are counted exactly")
    parser.add_argument(
        "--keep-statistics", action="store_true", help="leave the SAE's own statistics, and its revision, as they are"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of the arithmetic on a CPU")


def run(arguments: argparse.Namespace) -> None:
    """Build, and say what was found."""
    torch.set_num_threads(arguments.threads)
    settings = BuildSettings(
        examples=arguments.examples, per_quantile=arguments.per_quantile, common=arguments.common, seed=arguments.seed
    )
    found = build_library(
        arguments.corpus, arguments.bundle, settings, arguments.work, arguments.device, arguments.keep_statistics
    )
    print(
        f"{found['library']}: {found['alive']:,} of {found['features']:,} features fire on {found['pictures']:,} "
        f"pictures, {found['l0']:.1f} on each; {found['minutes']:.1f} minutes"
    )


def build_library(
    corpus_directory: Path,
    bundle_directory: Path,
    settings: BuildSettings,
    work: Path | None = None,
    device: str = "cpu",
    keep_statistics: bool = False,
) -> dict[str, Any]:
    """Gives a bundle a new library without labels, and its SAE the statistics that edits go by; goes on after a kill.

    With ``keep_statistics`` the SAE keeps those it has.

    Raises:
        JobError: corpus and bundle do not fit, or something is not there, not readable or not writable.
    """
    started = time.monotonic()
    try:
        bundle = Bundle.open(bundle_directory)
        sae = SparseAutoencoder.load(bundle.part("sae").path)
    except BundleError as error:
        raise JobError(str(error)) from None
    corpus = EmbeddingCorpus.open(corpus_directory, encoder_revision=str(bundle.part("sae").facts["encoder_revision"]))
    if corpus.embed_dim != sae.d_in:
        raise JobError(f"{corpus_directory}: embeddings of {corpus.embed_dim} values, but the SAE takes {sae.d_in}")
    work = work or bundle_directory / ".build-library"
    try:
        with locked(work), Steps(Console(stderr=True)) as steps:
            facts = {"corpus": corpus.card.name, "rows": len(corpus), "sae": _weights_digest(bundle)}
            store = ActivationStore(work / "activations", facts)
            encode_corpus(corpus, sae, store, steps, device)
            measured = measure(store, len(corpus), sae.d_sae, settings, steps)
            staging = None if keep_statistics else work / "staging"
            library, revision = work / "library.sqlite", bundle.part("sae").revision
            if staging is not None:
                revision = stage_sae(bundle, staging, corpus, measured, settings)
            write_library(library, corpus, sae, revision, store, measured, settings, steps, device)
            put_in_place(bundle, staging, library)
    except OSError as error:
        reason = error.strerror or str(error)
        raise JobError(f"{work}: cannot be written ({reason}); make room and run the same command again") from None
    shutil.rmtree(work, ignore_errors=True)
    return {
        "library": str(bundle_directory / "library" / "library.sqlite"),
        "features": sae.d_sae,
        "alive": int((measured.spread.count > 0).sum()),
        "pictures": len(corpus),
        "l0": float(measured.l0.mean()),
        "minutes": (time.monotonic() - started) / 60,
    }


def _weights_digest(bundle: Bundle) -> str:
    """Of the SAE's weights alone: its revision changes with the statistics that are written here."""
    manifest = json.loads((bundle.directory / bundle_format.MANIFEST).read_text(encoding="utf-8"))
    return ",".join(
        entry["sha256"] for entry in manifest["files"] if entry["path"].endswith("sae/sae_weights.safetensors")
    )
