"""A small corpus of embeddings with pictures, and the bundle that it fits: what library jobs start from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from faceteer_runtime.bundle import Bundle
from faceteer_sae.model import SparseAutoencoder
from faceteer_trainer.corpus.shards import CorpusCard, Shard, write_embeds
from tiny_bundle import N_FEATURES

ROWS, D = 900, 32


class Corpus(NamedTuple):
    """Where bundle and corpus lie, and the embeddings [rows, d]."""

    bundle: Path
    directory: Path
    embeds: np.ndarray


def write_corpus(directory: Path, embeds: np.ndarray, revision: str, shard: int = 250) -> None:
    """Shards with names, captions and thumbnails that tell their row."""
    directory.mkdir()
    shards = []
    for number, start in enumerate(range(0, len(embeds), shard)):
        part = embeds[start : start + shard]
        names = f"embeds-{number:05}.safetensors", f"pictures-{number:05}.parquet"
        write_embeds(directory / names[0], part, dtype="float32", encoder_revision=revision)
        rows = range(start, start + len(part))
        table = {"name": [f"p{r}" for r in rows], "caption": [f"caption {r}" for r in rows],
                 "thumbnail": [f"webp {r}".encode() for r in rows]}  # fmt: skip
        pq.write_table(pa.table(table), directory / names[1])
        shards.append(Shard(names[0], len(part), names[1]))
    CorpusCard("test", revision, embeds.shape[1], "float32", tuple(shards)).write(directory)


def make_corpus(tiny_bundle: Path, tmp_path: Path) -> Corpus:
    """Mixtures of the tiny bundle's features, two of which never fire together; the bundle is a copy."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    rng = np.random.default_rng(0)
    sae = SparseAutoencoder.load(bundle / "sae")
    spread = rng.gamma(1.0, 1.0, (ROWS, 6)) * (rng.random((ROWS, 6)) < 0.5)
    mixture = np.stack([spread[r] @ sae.directions(rng.integers(0, N_FEATURES, 6)) for r in range(ROWS)])
    # Two of them never fire together: each row has one or the other.
    mixture += 3 * sae.directions(rng.integers(0, 2, ROWS))
    embeds = (sae.b_dec + 4 * mixture + 0.3 * rng.standard_normal((ROWS, D))).astype(np.float32)
    write_corpus(tmp_path / "corpus", embeds, Bundle.open(bundle).part("encoder").revision)
    return Corpus(bundle, tmp_path / "corpus", embeds)


def dense_features(corpus: Corpus) -> np.ndarray:
    """What fires on every row, by the service's own encoder, [rows, features]."""
    acts = np.zeros((ROWS, N_FEATURES), np.float32)
    for row, features in enumerate(SparseAutoencoder.load(corpus.bundle / "sae").encode(corpus.embeds)):
        acts[row, features.top_indices] = features.top_acts
    return acts
