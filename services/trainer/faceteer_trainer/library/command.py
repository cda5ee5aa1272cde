"""`faceteer_trainer build-library --corpus DIR --bundle B`: from embeddings to the library that the bundle serves.

Knows the options, the lock and the order of things that name each other's revisions, and nothing of the reckoning.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sqlite3
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faceteer_runtime.bundle import Bundle, BundleError
from faceteer_sae.model import SparseAutoencoder
from rich.console import Console

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.library.activations import ActivationStore
from faceteer_trainer.library.build import BuildSettings, encode_corpus, measure, write_library
from faceteer_trainer.library.placing import part_revision, place, ready, stage
from faceteer_trainer.library.statistics import CARD, STATISTICS, write_statistics
from faceteer_trainer.library.steps import Steps
from faceteer_trainer.locks import locked

_LIBRARY = "library/library.sqlite"
_WORK = ".build-library"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    defaults = BuildSettings()
    parser.add_argument("--corpus", type=Path, required=True, help="embeddings, made by embed with the same encoder")
    parser.add_argument("--bundle", type=Path, required=True, help="whose SAE it is, and which gets the library")
    parser.add_argument("--out", type=Path, help="write the library to this file, and leave the bundle as it is")
    parser.add_argument("--work", type=Path, help="for activations while it runs; by default the bundle's directory")
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
        arguments.corpus,
        arguments.bundle,
        settings,
        arguments.work,
        arguments.device,
        arguments.keep_statistics,
        arguments.out,
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
    out: Path | None = None,
) -> dict[str, Any]:
    """Gives a bundle a new library without labels, and its SAE the statistics that edits go by; goes on after a kill.

    With ``keep_statistics`` the SAE keeps those it has; with ``out`` the library goes there and the bundle stays as it
    is. Nothing of the bundle changes before everything is done.

    Raises:
        JobError: corpus and bundle do not fit, or something is not there, not readable or not writable.
    """
    started = time.monotonic()
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise JobError(f"--device {device}: there is no such GPU here; use --device cpu")
    # Of the names given only directories of our own inside them are ever deleted.
    inside, work = bundle_directory / _WORK, (work or bundle_directory) / _WORK
    staging = inside / "staging"
    try:
        with ExitStack() as stack:
            if bundle_directory.is_dir():
                stack.enter_context(locked(inside))
                place(staging, bundle_directory)
            bundle, sae, corpus = _opened(bundle_directory, corpus_directory)
            if work.resolve() != inside.resolve():
                stack.enter_context(locked(work))
            steps = stack.enter_context(Steps(Console(stderr=True)))
            store = ActivationStore(work / "activations", _facts(corpus, bundle))
            encode_corpus(corpus, sae, store, steps, device)
            measured = measure(store, len(corpus), sae.d_sae, settings, steps)
            revision, library = bundle.part("sae").revision, out
            renewed = [_LIBRARY] if keep_statistics else [_LIBRARY, f"sae/{STATISTICS}", f"sae/{CARD}"]
            if library is None:
                stage(bundle, staging, renewed)
                if not keep_statistics:
                    write_statistics(staging / "sae", corpus, measured)
                    revision = part_revision(staging, "sae")
                library = staging / _LIBRARY
            write_library(library, corpus, sae, revision, store, measured, settings, steps, device)
            if out is None:
                ready(staging, renewed, {"library": {"kind": "sqlite"}})
                place(staging, bundle_directory)
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(inside, ignore_errors=True)
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        where = getattr(error, "filename", None) or work
        raise JobError(f"{where}: cannot be written ({reason}); make room and run the same command again") from None
    return {
        "library": str(out or bundle_directory / _LIBRARY),
        "features": sae.d_sae,
        "alive": int((measured.spread.count > 0).sum()),
        "pictures": len(corpus),
        "l0": float(measured.l0.mean()),
        "minutes": (time.monotonic() - started) / 60,
    }


def _opened(bundle_directory: Path, corpus_directory: Path) -> tuple[Bundle, SparseAutoencoder, EmbeddingCorpus]:
    try:
        bundle = Bundle.open(bundle_directory)
        part = bundle.part("sae")
        sae = SparseAutoencoder.load(part.path)
    except BundleError as error:
        raise JobError(str(error)) from None
    encoder = part.facts.get("encoder_revision")
    if encoder is None:
        raise JobError(f"{bundle_directory}: bundle.json does not say for which encoder the SAE was made; seal it anew")
    corpus = EmbeddingCorpus.open(corpus_directory, encoder_revision=str(encoder))
    if corpus.embed_dim != sae.d_in:
        raise JobError(f"{corpus_directory}: embeddings of {corpus.embed_dim} values, but the SAE takes {sae.d_in}")
    return bundle, sae, corpus


def _facts(corpus: EmbeddingCorpus, bundle: Bundle) -> dict[str, Any]:
    """What activations depend on; of the corpus a digest of its card and of rows all over it."""
    digest = hashlib.sha256(json.dumps(asdict(corpus.card), sort_keys=True).encode())
    digest.update(corpus.rows(np.unique(np.linspace(0, len(corpus) - 1, 4096).astype(np.int64))).tobytes())
    return {"corpus": f"{corpus.card.name} {digest.hexdigest()[:16]}", "sae": bundle.part("sae").revision}
