"""`train-sae --recipe postcards`: the recipe of the bundle that ships, on any small corpus.

It knows nothing of postcards: only of that recipe (`train`), which holds all embeddings in memory and anneals k.
"""

from __future__ import annotations

import argparse

import torch

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.sae import outputs
from faceteer_trainer.sae.model import save_sae
from faceteer_trainer.sae.statistics import embedding_statistics, measure_features, save_statistics
from faceteer_trainer.sae.train import SaeSettings, explained_variance, train_sae
from faceteer_trainer.training import Budget

# All embeddings and all activations are held in memory: 1 GB of float32 each.
MOST_VALUES = 256_000_000


def train(corpus: EmbeddingCorpus, arguments: argparse.Namespace) -> None:
    """Train by the recipe and write what the generic trainer writes.

    Raises:
        JobError: the corpus or the dictionary is too large for a recipe that holds everything in memory.
    """
    recipe = SaeSettings()
    d_sae = arguments.d_sae or recipe.d_sae
    if len(corpus) * max(d_sae, corpus.embed_dim) > MOST_VALUES:
        raise JobError(
            f"--recipe postcards holds everything in memory: {len(corpus)} rows by {max(d_sae, corpus.embed_dim)} are "
            "too much; leave --recipe out"
        )
    torch.manual_seed(arguments.seed)
    embeds = torch.cat([torch.from_numpy(chunk) for _, chunk in corpus.chunks()])
    budget = Budget(minutes=arguments.minutes) if arguments.minutes else Budget(steps=arguments.steps or 10_000)
    model = train_sae(embeds, arguments.out, budget, SaeSettings(d_sae=d_sae), arguments.seed)
    with torch.no_grad():
        features = model.encode(embeds)
        x_hat = model.decode(features)
    figures = {
        "explained_variance": explained_variance(embeds, x_hat), "l0": float((features > 0).sum(-1).float().mean()),
        "cosine": float(torch.nn.functional.cosine_similarity(embeds, x_hat, dim=-1).mean()),
        "dead_share": float((~(features > 0).any(0)).float().mean()), "rows": len(embeds),
    }  # fmt: skip
    metadata = {
        "trained_as": "batchtopk", "recipe": "postcards", "encoder_revision": corpus.encoder_revision,
        "corpus": corpus.card.name, "figures": figures, "embedding_statistics": embedding_statistics(embeds, features),
    }  # fmt: skip
    save_statistics(measure_features(features), arguments.out / "feature_statistics.safetensors")
    save_sae(model, arguments.out, metadata)
    report = {
        "recipe": "postcards", "settings": {"d_sae": d_sae, "k": recipe.k, "batch": recipe.batch},
        "seed": arguments.seed, "rows": len(corpus), "encoder_revision": corpus.encoder_revision, "figures": figures,
    }  # fmt: skip
    outputs.write_json(arguments.out / "training.json", report)
    print(f"{arguments.out}: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
