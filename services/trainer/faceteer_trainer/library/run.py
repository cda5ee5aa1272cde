"""The build-library job: from embeddings to the library that the bundle serves, moved into it as the last step."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faceteer_runtime.bundle import Bundle
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.statistics import FILE as STATISTICS
from faceteer_sae.statistics import load_statistics
from faceteer_sae.weights import CONFIG

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.files import locked, writing
from faceteer_trainer.library.activations import ActivationStore
from faceteer_trainer.library.measure import BuildSettings, encode_corpus, measure
from faceteer_trainer.library.staging import commit, part_revision, seal_staged, stage
from faceteer_trainer.library.statistics import share_unlike, write_statistics
from faceteer_trainer.library.writing import MOST_UNLIKE, write_library
from faceteer_trainer.progress import Progress

_LIBRARY = "library/library.sqlite"
_WORK = ".build-library"


@dataclass(frozen=True)
class Built:
    """A library that was built.

    Attributes:
        library: where it lies.
        features, alive: all, and those that fire.
        pictures: looked at.
        l0: features a picture, on average.
        minutes: it took.
        unlike: the share of pictures unlike those that the SAE's own statistics were of.
    """

    library: Path
    features: int
    alive: int
    pictures: int
    l0: float
    minutes: float
    unlike: float


def build_library(
    corpus_directory: Path,
    bundle_directory: Path,
    settings: BuildSettings,
    work: Path | None = None,
    device: str = "cpu",
    keep_statistics: bool = False,
    out: Path | None = None,
    accept_foreign: bool = False,
) -> Built:
    """Gives a bundle a new library without labels, and its SAE the statistics that edits need; resumes after a kill.

    With ``keep_statistics`` the SAE keeps those it has; with ``out`` the library goes there and the bundle stays as it
    is. Then the library takes the unit SCALED from the SAE's statistics, so that both say the same. A corpus most of
    whose pictures are unlike the SAE's own is refused; with ``accept_foreign`` its library is marked, and the SAE keeps
    its statistics. Nothing of the bundle changes before everything is done.

    Raises:
        BundleError: no such bundle, or no SAE in it.
        JobError: corpus and bundle do not fit, or something is not there, not readable or not writable.
    """
    started = time.monotonic()
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise JobError(f"--device {device}: there is no such GPU here; use --device cpu")
    # Only our own directories inside the given paths are ever deleted.
    inside, work = bundle_directory / _WORK, (work or bundle_directory) / _WORK
    staging = inside / "staging"
    with ExitStack() as stack:
        stack.enter_context(writing(work))
        if bundle_directory.is_dir():
            stack.enter_context(locked(inside))
            commit(staging, bundle_directory)
        bundle, sae, corpus = _opened(bundle_directory, corpus_directory)
        if work.resolve() != inside.resolve():
            stack.enter_context(locked(work))
        report = stack.enter_context(Progress())
        store = ActivationStore(work / "activations", _facts(corpus, bundle))
        encode_corpus(corpus, sae, store, report, device)
        statistics = load_statistics(bundle.part("sae").path, sae.d_in, sae.d_sae)
        unlike = share_unlike(corpus, sae, store, statistics)
        if unlike > MOST_UNLIKE:
            if not accept_foreign:
                raise JobError(_foreign(corpus_directory, bundle, unlike))
            keep_statistics = True
        measured = measure(store, len(corpus), sae.d_sae, settings, report)
        revision, library = bundle.part("sae").revision, out
        renewed = [_LIBRARY] if keep_statistics else [_LIBRARY, f"sae/{STATISTICS}", f"sae/{CONFIG}"]
        if library is None:
            stage(bundle, staging, renewed)
            if not keep_statistics:
                write_statistics(staging / "sae", corpus, sae, store, measured)
                revision = part_revision(staging, "sae")
            library = staging / _LIBRARY
        try:
            kept = statistics if keep_statistics or out is not None else None
            write_library(library, corpus, sae, revision, store, measured, settings, report, device, kept, unlike)
        except sqlite3.Error as error:
            raise JobError(
                f"{library}: could not be written ({error}); make room and run the same command again"
            ) from None
        if out is None:
            seal_staged(staging, renewed, {"library": {"kind": "sqlite"}})
            commit(staging, bundle_directory)
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(inside, ignore_errors=True)
    minutes = (time.monotonic() - started) / 60
    alive = int((measured.spread.count > 0).sum())
    return Built(
        out or bundle_directory / _LIBRARY, sae.d_sae, alive, len(corpus), float(measured.l0.mean()), minutes, unlike
    )


def _foreign(corpus: Path, bundle: Bundle, unlike: float) -> str:
    return (
        f"{corpus}: {unlike:.0%} of these pictures are unlike those that encoder and SAE of bundle {bundle.name!r} "
        "know. Features would be named and scored by an encoder that does not understand what it sees, and the scores "
        "would look good all the same. Use a bundle made for such pictures (docs/bundles.md), or add "
        "--accept-foreign to go on: the library is then marked, and the SAE keeps its statistics"
    )


def _opened(bundle_directory: Path, corpus_directory: Path) -> tuple[Bundle, SparseAutoencoder, EmbeddingCorpus]:
    bundle = Bundle.open(bundle_directory)
    part = bundle.part("sae")
    sae = SparseAutoencoder.load(part.path)
    encoder = part.facts.get("encoder_revision")
    if encoder is None:
        raise JobError(f"{bundle_directory}: bundle.json does not say for which encoder the SAE was made; reseal it")
    corpus = EmbeddingCorpus.open(corpus_directory, encoder_revision=str(encoder))
    if corpus.embed_dim != sae.d_in:
        raise JobError(f"{corpus_directory}: embeddings of {corpus.embed_dim} values, but the SAE takes {sae.d_in}")
    return bundle, sae, corpus


def _facts(corpus: EmbeddingCorpus, bundle: Bundle) -> dict[str, Any]:
    """What activations depend on; of the corpus a digest of its card and of rows all over it."""
    digest = hashlib.sha256(json.dumps(asdict(corpus.card), sort_keys=True).encode())
    digest.update(corpus.rows(np.unique(np.linspace(0, len(corpus) - 1, 4096).astype(np.int64))).tobytes())
    return {"corpus": f"{corpus.card.name} {digest.hexdigest()[:16]}", "sae": bundle.part("sae").revision}
