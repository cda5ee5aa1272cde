"""Gives a bundle's SAE the statistics that edits need: firing shares, p99, rivals, and what embeddings look like."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from faceteer_library.editor import LibraryEditor
from faceteer_runtime.bundle import Bundle
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.novelty import FEWEST, Novelty
from faceteer_sae.statistics import (
    FILE,
    FeatureStatistics,
    embedding_statistics,
    load_statistics,
    save_statistics,
)
from faceteer_sae.weights import update_metadata

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.files import locked, writing
from faceteer_trainer.library.activations import ActivationStore
from faceteer_trainer.library.encoding import Active, BulkEncoder
from faceteer_trainer.library.measure import CorpusStatistics
from faceteer_trainer.library.staging import commit, part_revision, seal_staged, stage
from faceteer_trainer.sae.statistics import NOVELTY_ROWS

_LIBRARY = "library/library.sqlite"
# Pictures of a corpus that are compared with the SAE's own.
_JUDGED = 2000


def write_statistics(
    directory: Path,
    corpus: EmbeddingCorpus,
    sae: SparseAutoencoder,
    store: ActivationStore,
    measured: CorpusStatistics,
) -> None:
    """Rewrites the statistics of an SAE's directory, and what its card says of embeddings."""
    rows, rivals = _sampled(corpus), measured.rivals
    sample = corpus.rows(rows)
    mean: npt.NDArray[np.float32] = sample.mean(0)
    novelty = _novelty(sample, store.rows(rows), sae, mean)
    statistics = FeatureStatistics(measured.firing_share, measured.p99, rivals.offsets, rivals.indices, mean, novelty)
    save_statistics(directory, statistics)
    norms = np.linalg.norm(sample, axis=1)
    update_metadata(directory, {"embedding_statistics": embedding_statistics(norms, measured.l0)})


def share_unlike(
    corpus: EmbeddingCorpus, sae: SparseAutoencoder, store: ActivationStore, statistics: FeatureStatistics | None
) -> float:
    """The share of a corpus' pictures that are unlike those the SAE's statistics are of; 0 where these do not say."""
    if statistics is None or statistics.novelty is None or statistics.embedding_mean is None:
        return 0.0
    novelty, mean = statistics.novelty, statistics.embedding_mean
    rows = np.unique(np.linspace(0, len(corpus) - 1, min(len(corpus), _JUDGED)).astype(np.int64))
    x = corpus.rows(rows)
    errors = _squared_errors(x, store.rows(rows), sae)
    scores = [novelty.score(float(error), one - mean) for error, one in zip(errors, x, strict=True)]
    return float(np.mean(np.array(scores) > novelty.limit[0]))


def learn_novelty(bundle_directory: Path, corpus_directory: Path, device: str = "cpu") -> Novelty:
    """Gives an otherwise complete bundle the score for pictures unlike the corpus; its other statistics stay.

    The SAE's revision changes with its files, so the new one is recorded in the library.

    Raises:
        BundleError: no such bundle, no SAE in it, or no statistics.
        JobError: corpus and bundle do not fit, the corpus is too small, or something cannot be read or written.
    """
    inside = bundle_directory / ".learn-novelty"
    staging = inside / "staging"
    with ExitStack() as stack:
        stack.enter_context(writing(inside))
        bundle = Bundle.open(bundle_directory)
        part = bundle.part("sae")
        stack.enter_context(locked(inside))
        sae = SparseAutoencoder.load(part.path)
        statistics = load_statistics(part.path, sae.d_in, sae.d_sae)
        if statistics is None:
            raise JobError(f"{part.path}: has no feature statistics to add to; run build-library")
        corpus = EmbeddingCorpus.open(corpus_directory, encoder_revision=str(part.facts.get("encoder_revision")))
        if corpus.embed_dim != sae.d_in:
            raise JobError(f"{corpus_directory}: embeddings of {corpus.embed_dim} values, but the SAE takes {sae.d_in}")
        sample = corpus.rows(_sampled(corpus))
        mean = statistics.embedding_mean if statistics.embedding_mean is not None else sample.mean(0)
        novelty = _novelty(sample, BulkEncoder(sae, device).encode(sample), sae, mean)
        if novelty is None:
            raise JobError(f"{corpus_directory}: {len(corpus)} pictures; {FEWEST} different ones are the fewest")
        renewed = [f"sae/{FILE}", *([_LIBRARY] if bundle.has_part("library") else [])]
        stage(bundle, staging, renewed)
        save_statistics(staging / "sae", replace(statistics, embedding_mean=mean, novelty=novelty))
        if _LIBRARY in renewed:
            with LibraryEditor(staging / _LIBRARY) as editor:
                editor.meta("sae_revision", part_revision(staging, "sae"))
        seal_staged(staging, renewed, {})
        commit(staging, bundle_directory)
        shutil.rmtree(inside, ignore_errors=True)
    return novelty


def _novelty(
    x: npt.NDArray[np.float32], active: Active, sae: SparseAutoencoder, mean: npt.NDArray[np.float32]
) -> Novelty | None:
    """Learnt from embeddings [m, d] and the features that fire on them."""
    return Novelty.fit(x, _squared_errors(x, active, sae), mean)


def _squared_errors(x: npt.NDArray[np.float32], active: Active, sae: SparseAutoencoder) -> npt.NDArray[np.float64]:
    """||x - x_hat||^2 of each, [m]."""
    errors = np.empty(len(x))
    for row, one in enumerate(x):
        fired = slice(active.indptr[row], active.indptr[row + 1])
        errors[row] = np.square(one - sae.decode(active.indices[fired], active.values[fired])).sum()
    return errors


def _sampled(corpus: EmbeddingCorpus) -> npt.NDArray[np.int64]:
    """Rows from all over the corpus."""
    return np.unique(np.linspace(0, len(corpus) - 1, min(len(corpus), NOVELTY_ROWS)).astype(np.int64))
