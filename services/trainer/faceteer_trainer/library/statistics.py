"""Gives a bundle's SAE what edits go by: firing shares, the unit SCALED, rivals, and what embeddings look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from faceteer_sae.statistics import FeatureStatistics, embedding_statistics, save_statistics
from faceteer_sae.weights import update_metadata

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.library.measure import CorpusStatistics


def write_statistics(directory: Path, corpus: EmbeddingCorpus, measured: CorpusStatistics) -> None:
    """Writes the statistics of an SAE's directory anew, and what its card says of embeddings."""
    sample, rivals = _sample(corpus), measured.rivals
    statistics = FeatureStatistics(measured.firing_share, measured.p99, rivals.offsets, rivals.indices, sample.mean(0))
    save_statistics(directory, statistics)
    norms = np.linalg.norm(sample, axis=1)
    update_metadata(directory, {"embedding_statistics": embedding_statistics(norms, measured.l0)})


def _sample(corpus: EmbeddingCorpus) -> npt.NDArray[np.float32]:
    return corpus.rows(np.unique(np.linspace(0, len(corpus) - 1, min(len(corpus), 20_000)).astype(np.int64)))
