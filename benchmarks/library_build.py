"""A feature library at full size: 1.4 million embeddings of 1,280 values, an SAE of 163,840 features, within 8 GB.

    python benchmarks/library_build.py --corpus DIR --work DIR [--rows N]

DIR is what benchmarks/full_size_corpus.py wrote. The SAE's first features are the corpus' own dictionary, the rest are
random directions that fire rarely or never, as two thirds of the original work's did. Prints minutes, features alive,
L0 and the largest resident memory, as JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from faceteer_postcards.synthetic import SparseMixtures
from faceteer_runtime.bundle import seal
from faceteer_sae.weights import SaeWeights, write_weights
from faceteer_trainer.corpus.shards import CARD, CorpusCard, EmbeddingCorpus, Shard
from faceteer_trainer.library.measure import BuildSettings
from faceteer_trainer.library.run import build_library

D_SAE = 163_840


def mixtures_of(corpus: EmbeddingCorpus) -> SparseMixtures:
    """The settings, by the name that a synthetic corpus carries: synthetic-<n_true>x<d>-<mean_active>-<seed>."""
    size, active, seed = corpus.card.name.removeprefix("synthetic-").split("-")
    n_true, d = map(int, size.split("x"))
    return SparseMixtures(n_true, d, float(active), int(seed))


def write_bundle(directory: Path, corpus: EmbeddingCorpus) -> None:
    """An SAE part alone, whose encoder is the corpus'."""
    true = torch.from_numpy(np.asarray(mixtures_of(corpus).dictionary, np.float32))
    rest = torch.randn(D_SAE - len(true), corpus.embed_dim, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([true, torch.nn.functional.normalize(rest, dim=1)])
    sample = torch.from_numpy(corpus.rows(np.arange(0, len(corpus), max(1, len(corpus) // 256))))
    pre = sample @ rows.T
    # So that a true feature fires where it is clearly there, and a random one about once in some thousand pictures.
    threshold = float(pre[:, : len(true)].topk(24, dim=1).values[:, -1].mean())
    bias = torch.zeros(D_SAE)
    bias[len(true) :] = threshold - pre[:, len(true) :].std() * torch.linspace(3.6, 6.0, D_SAE - len(true))
    thresholds, b_dec = torch.full((D_SAE,), threshold), torch.zeros(corpus.embed_dim)
    weights = SaeWeights("jumprelu", rows, bias, rows, b_dec, False, threshold=thresholds)
    write_weights(directory / "sae", weights, "float16", screen=False)
    manifest = directory / "bundle.json"
    seal(directory, {"name": "full-size", "parts": {"sae": {}}, "licences": {}})
    sealed = json.loads(manifest.read_text())
    sealed["parts"]["sae"]["encoder_revision"] = corpus.encoder_revision
    manifest.write_text(json.dumps(sealed))


def first_rows(corpus: EmbeddingCorpus, rows: int, directory: Path) -> Path:
    """A corpus of the first shards only."""
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    for shard in corpus.card.shards:
        if sum(kept.rows for kept in shards) >= rows:
            break
        target = directory / shard.embeds
        target.unlink(missing_ok=True)
        target.symlink_to((corpus.directory / shard.embeds).resolve())
        shards.append(shard)
    card = corpus.card
    CorpusCard(card.name, card.encoder_revision, card.embed_dim, card.dtype, tuple(shards)).write(directory)
    assert (directory / CARD).exists()
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    corpus = EmbeddingCorpus.open(arguments.corpus)
    bundle = arguments.work / "bundle"
    if not (bundle / "bundle.json").exists():
        shutil.rmtree(bundle, ignore_errors=True)
        write_bundle(bundle, corpus)
    directory = arguments.corpus
    if arguments.rows:
        directory = first_rows(corpus, arguments.rows, arguments.work / f"first-{arguments.rows}")
    began = time.monotonic()
    found = build_library(directory, bundle, BuildSettings(), arguments.work / "activations")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    library = bundle / "library" / "library.sqlite"
    print(
        json.dumps(
            {
                **found,
                "minutes": round((time.monotonic() - began) / 60, 1),
                "peak_resident_gb": round(peak / 1e9, 2),
                "library_mb": round(library.stat().st_size / 1e6, 1),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
