"""`python -m faceteer_trainer thin-sae`: an SAE without near copies and latents that hardly ever fire."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from faceteer_sae.statistics import save_statistics
from faceteer_sae.weights import read_weights, write_weights

from faceteer_trainer.cli.jobs import positive
from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.files import locked, writing
from faceteer_trainer.sae.autoencoder import Autoencoder
from faceteer_trainer.sae.sampling import BlockShuffle
from faceteer_trainer.sae.statistics import measure
from faceteer_trainer.sae.thinning import MOST_LATENTS, Thinning, thin

_DEFAULT = Thinning()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    add = parser.add_argument
    add("--sae", type=Path, required=True, help="folder of a batchtopk or matryoshka SAE: train-sae's, a bundle's sae/")
    add(
        "--corpus", type=Path, required=True, help="folder that embed made, by the encoder that the SAE was trained for"
    )
    add("--out", type=Path, required=True, help="folder for the thinned SAE; another one than --sae")
    add("--k", type=float, default=0.0, help="firings a picture in the end; the SAE's own by default")
    add("--alike", type=float, default=_DEFAULT.alike,
        help=f"decoder cosine or correlation above which one of two latents goes ({_DEFAULT.alike})")  # fmt: skip
    add("--least-share", type=float, default=_DEFAULT.least_share,
        help=f"of pictures, on which a latent that stays must fire ({_DEFAULT.least_share})")  # fmt: skip
    add("--whole", type=float, default=_DEFAULT.whole, help="of what sets a feature's pictures apart, the share "
        f"that turning it off must take away ({_DEFAULT.whole}); 0: not asked for")  # fmt: skip
    add(
        "--apart",
        type=float,
        default=_DEFAULT.apart,
        help=f"how strictly rivals exclude one another ({_DEFAULT.apart})",
    )
    add("--steps", type=positive, default=_DEFAULT.steps, help=f"after each removal ({_DEFAULT.steps})")
    add("--rows", type=positive, default=16_384, help="of the corpus, that it is trained on (16384)")
    add("--statistics-rows", type=positive, default=100_000, help="rows that the features are measured on (100000)")
    add("--dtype", choices=("float32", "float16"), default="float32", help="of the saved weights")
    add("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> None:
    """Thin the SAE, measure it, and write it as a bundle's sae/ holds it."""
    settings = _settings(arguments)
    weights = read_weights(arguments.sae)
    if weights.architecture != "batchtopk":
        raise JobError(f"{arguments.sae}: is a {weights.architecture}; only batchtopk (and matryoshka) can be thinned")
    if len(weights.W_enc) > MOST_LATENTS:
        raise JobError(
            f"{arguments.sae}: has {len(weights.W_enc):,} latents; all pairs are compared, so {MOST_LATENTS:,} at most"
        )
    corpus = EmbeddingCorpus.open(arguments.corpus)
    if corpus.embed_dim != weights.d_in:
        raise JobError(
            f"{arguments.corpus}: embeddings of {corpus.embed_dim} values, but {arguments.sae} takes {weights.d_in}"
        )
    if settings.k > len(weights.W_enc):
        raise JobError(f"--k is {settings.k}, but {arguments.sae} has {len(weights.W_enc)} latents; choose a smaller k")
    if arguments.out.resolve() == arguments.sae.resolve():
        raise JobError("--out is --sae; give another folder, so that the SAE is kept")
    with locked(arguments.out):
        count = min(arguments.rows, len(corpus))
        x = torch.from_numpy(corpus.rows(BlockShuffle(len(corpus), count, arguments.seed + 1, block=1).indices(0)))
        thinned = thin(Autoencoder(weights), x, settings, lambda line: print(line, flush=True))
        measured = measure(thinned, corpus, arguments.statistics_rows)
        # What is known of the SAE that it came from is not true of this one.
        thinned.metadata = {
            "trained_as": "thinned", "thinned_from": len(weights.W_enc), "seed": arguments.seed,
            "encoder_revision": corpus.encoder_revision, "corpus": corpus.card.name, "figures": measured.figures,
            "embedding_statistics": measured.embedding_statistics,
        }  # fmt: skip
        with writing(arguments.out):
            save_statistics(arguments.out, measured.statistics)
            write_weights(arguments.out, thinned.weights(), arguments.dtype, layout="saelens")
    print(f"{arguments.out}: {thinned.d_sae} latents  "
          + "  ".join(f"{name} {value:.4g}" for name, value in measured.figures.items()))  # fmt: skip


def _settings(a: argparse.Namespace) -> Thinning:
    if not 0 < a.alike <= 1:
        raise JobError(f"--alike is {a.alike}; it is a cosine, above 0 and up to 1")
    if not 0 <= a.least_share < 1:
        raise JobError(f"--least-share is {a.least_share}; it is a share, 0 to below 1")
    for name in ("k", "whole", "apart", "seed"):
        if not getattr(a, name) >= 0:
            raise JobError(f"--{name} is {getattr(a, name)}; it must not be negative")
    return Thinning(
        k=a.k, alike=a.alike, least_share=a.least_share, whole=a.whole, apart=a.apart, steps=a.steps, seed=a.seed
    )
