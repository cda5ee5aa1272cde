"""Measures an imported SAE on a corpus: what its features do there, and whether it is the right SAE for it at all."""

from __future__ import annotations

from pathlib import Path

from faceteer_sae.statistics import save_statistics
from faceteer_sae.weights import update_metadata

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.sae.autoencoder import Autoencoder
from faceteer_trainer.sae.statistics import measure


def measure_import(directory: Path, corpus: EmbeddingCorpus, rows: int) -> str:
    """Writes feature_statistics.safetensors, and embedding_statistics and figures into cfg.json.

    Args:
        directory: with cfg.json and sae_weights.safetensors.
        corpus: raw embeddings of the encoder that the SAE is for.
        rows: at most as many, from all over the corpus.

    Returns:
        The figures in words, with a warning where they say that the SAE is not for these embeddings.
    """
    sae = Autoencoder.load(directory)
    measured = measure(sae, corpus, rows)
    figures = measured.figures
    save_statistics(directory, measured.statistics)
    facts = {"embedding_statistics": measured.embedding_statistics, "corpus": corpus.card.name, "figures": figures}
    update_metadata(directory, facts)
    said = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
    # More features than the embedding has values, or worse than the mean embedding: nothing sparse was found.
    if figures["explained_variance"] < 0 or figures["l0"] > sae.d_in:
        said += (
            "\nWARNING: that is not what an SAE does on the embeddings that it was trained on; look at the encoder, "
            "its preprocessing, and whether the embeddings are raw"
        )
    return said
