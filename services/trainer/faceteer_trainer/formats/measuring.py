"""Measures an imported SAE on a corpus: what its features do there, and whether it is the right SAE for it at all.

Knows no format; the SAE lies as a bundle holds it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import cast

from faceteer_sae.statistics import FILE as STATISTICS
from faceteer_sae.weights import CONFIG

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.sae.architectures import Autoencoder
from faceteer_trainer.sae.comparison import ServedSae
from faceteer_trainer.sae.outputs import measure, write_json
from faceteer_trainer.sae.statistics import save_statistics


def measure_import(directory: Path, corpus: EmbeddingCorpus, rows: int) -> str:
    """Writes feature_statistics.safetensors, and embedding_statistics and figures into cfg.json.

    Args:
        directory: with cfg.json and sae_weights.safetensors.
        corpus: raw embeddings of the encoder that the SAE is for.
        rows: at most as many, from all over the corpus.

    Returns:
        The figures in words, with a warning where they say that the SAE is not for these embeddings.
    """
    sae = ServedSae.load(directory)
    measured = measure(cast(Autoencoder, sae), corpus, 1.0, sae.config.k, rows)
    part = directory / f"{STATISTICS}.part"
    save_statistics(measured.statistics, part)
    os.replace(part, directory / STATISTICS)
    card = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    card["metadata"] |= {
        "embedding_statistics": measured.embedding_statistics, "corpus": corpus.card.name, "figures": measured.figures,
    }  # fmt: skip
    write_json(directory / CONFIG, card)
    figures = measured.figures
    said = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
    # More features than the embedding has values, or worse than the mean embedding: nothing sparse was found.
    if figures["explained_variance"] < 0 or figures["l0"] > sae.d_in:
        said += (
            "\nWARNING: that is not what an SAE does on the embeddings that it was trained on; look at the encoder, "
            "its preprocessing, and whether the embeddings are raw"
        )
    return said
