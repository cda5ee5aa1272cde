"""Gives a bundle's SAE what edits go by: firing shares, the unit SCALED, rivals, and what embeddings look like."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.library.measure import CorpusStatistics

STATISTICS, CARD = "feature_statistics.safetensors", "cfg.json"
_QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}


def write_statistics(directory: Path, corpus: EmbeddingCorpus, measured: CorpusStatistics) -> None:
    """Writes the statistics of an SAE's directory anew, and what its card says of embeddings."""
    _write_features(directory / STATISTICS, corpus, measured)
    _write_card(directory / CARD, corpus, measured)


def _write_features(path: Path, corpus: EmbeddingCorpus, measured: CorpusStatistics) -> None:
    save_file(
        {
            "firing_share": torch.from_numpy(measured.firing_share),
            "p99": torch.from_numpy(measured.p99),
            "rivals_offsets": torch.from_numpy(measured.rivals.offsets),
            "rivals_indices": torch.from_numpy(measured.rivals.indices),
            "embedding_mean": torch.from_numpy(_sample(corpus).mean(0)),
        },
        path,
    )


def _write_card(path: Path, corpus: EmbeddingCorpus, measured: CorpusStatistics) -> None:
    card = json.loads(path.read_text(encoding="utf-8"))
    norms = np.linalg.norm(_sample(corpus), axis=1)
    card.setdefault("metadata", {})["embedding_statistics"] = {
        "norm": {name: float(np.quantile(norms, q)) for name, q in _QUANTILES.items()},
        "l0": {name: float(np.quantile(measured.l0, q)) for name, q in _QUANTILES.items()},
    }
    path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _sample(corpus: EmbeddingCorpus) -> npt.NDArray[np.float32]:
    return corpus.rows(np.unique(np.linspace(0, len(corpus) - 1, min(len(corpus), 20_000)).astype(np.int64)))
