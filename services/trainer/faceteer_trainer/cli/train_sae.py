"""`python -m faceteer_trainer train-sae`: a corpus of embeddings to an SAE that a bundle serves."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

import torch
from faceteer_runtime.files import write_json
from torch.utils.tensorboard import SummaryWriter

from faceteer_trainer.budget import Budget
from faceteer_trainer.cli.jobs import positive
from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.files import locked
from faceteer_trainer.sae.losses import Loss, Losses
from faceteer_trainer.sae.trainer import ARCHITECTURES, SPARSE, STARTS, Settings, Trainer, flat

_LOSS, _SETTINGS = Loss(), Settings("topk", 1)
_PREFIXES = (1 / 16, 1 / 4, 1.0)
# Latents start as the published loss needs them, and none is ever treated as dead.
_NOT_FOR_STANDARD = ("start", "start_k", "reset_every")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="folder that embed made")
    add("--out", type=Path, required=True, help="folder for the SAE; a killed run resumes")
    add("--architecture", choices=ARCHITECTURES, default="batchtopk", help="default: batchtopk")
    add("--d-sae", type=positive, metavar="N", help="latents; 8 times the embedding's length by default")
    add("--k", type=positive, default=_LOSS.k, help="firings a picture; jumprelu aims at it, standard ignores it (32)")
    add("--l1", type=float, default=_LOSS.l1, help="standard: weight of the sum over batch and latents (4e-5)")
    add("--l0-weight", type=float, default=_LOSS.l0_weight, help="jumprelu: weight of (L0 / k - 1) squared")
    add("--bandwidth", type=float, default=_LOSS.bandwidth, help="jumprelu: width of the kernel")
    add("--prefixes", type=_shares, default=_PREFIXES, metavar="SHARES", help="matryoshka: 0.0625,0.25,1")
    add(
        "--start",
        choices=STARTS,
        default=_SETTINGS.start,
        help="initial directions: random (default); neighbours: "
        "differences of near neighbours; skewed: where embeddings are most skewed",
    )
    add("--start-k", type=float, default=_SETTINGS.start_k, help="k at the start, from which it falls to --k; 0: none")
    add("--anneal", type=float, default=_SETTINGS.anneal, help=f"budget's share in which k falls ({_SETTINGS.anneal})")
    add(
        "--reset-every",
        type=int,
        default=_SETTINGS.reset_every,
        help="steps between resets of dead latents to unexplained embeddings; 0: never",
    )
    add("--hold-b-dec", action="store_true", help="keep b_dec at the corpus' mean")  # fmt: skip
    add("--steps", type=positive, help="how many (10000); reproducible to the bit")
    add("--minutes", type=float, help="how long instead, on this machine")
    add("--batch", type=positive, default=_SETTINGS.batch, help=f"rows a step ({_SETTINGS.batch})")
    add("--lr", type=float, default=_SETTINGS.rate, help=f"peak learning rate ({_SETTINGS.rate})")
    add("--warmup", type=int, default=_SETTINGS.warmup, help=f"steps ({_SETTINGS.warmup})")
    add("--decay", type=float, default=_SETTINGS.decay, help=f"share of the budget, at its end ({_SETTINGS.decay})")
    add("--aux-k", type=int, default=_LOSS.aux_k, help=f"dead latents trained on the residual ({_LOSS.aux_k})")
    add("--dead-after", type=positive, default=_SETTINGS.dead_after, help="rows without a firing (50000)")
    add("--clip-norm", type=float, default=_SETTINGS.clip_norm, help="of the gradient (1); 0: none")
    add("--bf16", action="store_true", help="matrix products in bfloat16")
    add("--kernels", choices=("auto", "sparse", "dense"), default="auto", help="auto: by measured speed")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    add("--dtype", choices=("float32", "float16"), default="float32", help="of the saved weights")
    add("--checkpoint-minutes", type=float, default=5.0)
    add("--statistics-rows", type=positive, default=100_000, help="rows that the features are measured on (100000)")
    add("--log-every", type=positive, default=50, help="steps (50)")


def run(arguments: argparse.Namespace) -> None:
    """Train, or go on training."""
    corpus = EmbeddingCorpus.open(arguments.corpus)
    if arguments.steps and arguments.minutes:
        raise JobError("--steps and --minutes were both given; choose one")
    if arguments.minutes is not None and arguments.minutes <= 0:
        raise JobError(f"--minutes is {arguments.minutes}; it must be above 0")
    with locked(arguments.out):
        _train(corpus, arguments)


def settings_of(arguments: argparse.Namespace, embed_dim: int) -> Settings:
    """The options as settings.

    Raises:
        JobError: options that do not go together, naming them.
    """
    a = arguments
    d_sae = a.d_sae or 8 * embed_dim
    if a.k > d_sae:
        raise JobError(f"--k is {a.k}, but --d-sae is {d_sae}; choose a smaller k")
    if a.kernels == "sparse" and a.architecture not in SPARSE:
        raise JobError(f"--kernels sparse does not go with {a.architecture}; give auto, or one of {', '.join(SPARSE)}")
    for name in ("lr", "l1", "l0_weight", "bandwidth"):
        if not getattr(a, name) > 0:
            raise JobError(f"--{name.replace('_', '-')} is {getattr(a, name)}; it must be above 0")
    if not 0 <= a.decay <= 1:
        raise JobError(f"--decay is {a.decay}; it is a share of the budget, 0 to 1")
    if a.architecture == "standard" and (
        given := [n for n in _NOT_FOR_STANDARD if getattr(a, n) != getattr(_SETTINGS, n)]
    ):
        raise JobError(f"--{given[0].replace('_', '-')} does not go with standard; leave it out")
    if a.start_k and not a.k <= a.start_k <= d_sae:
        raise JobError(f"--start-k is {a.start_k}; it must be {a.k} (--k) to {d_sae} (--d-sae)")
    if not 0 < a.anneal <= 1:
        raise JobError(f"--anneal is {a.anneal}; it is a share of the budget, above 0 and up to 1")
    for name in ("warmup", "aux_k", "clip_norm", "reset_every", "seed"):
        if getattr(a, name) < 0:
            raise JobError(f"--{name.replace('_', '-')} is {getattr(a, name)}; it must not be negative")
    prefixes = tuple(a.prefixes) if a.architecture == "matryoshka" else _LOSS.prefixes
    loss = Loss(k=a.k, l1=a.l1, l0_weight=a.l0_weight, bandwidth=a.bandwidth, aux_k=a.aux_k, prefixes=prefixes)
    budget = Budget(minutes=a.minutes) if a.minutes else Budget(steps=a.steps or 10_000)
    return Settings(
        architecture=a.architecture, d_sae=d_sae, loss=loss, budget=budget, batch=a.batch, rate=a.lr, warmup=a.warmup,
        decay=a.decay, clip_norm=a.clip_norm, dead_after=a.dead_after, bf16=a.bf16, kernels=a.kernels, start=a.start,
        start_k=a.start_k, anneal=a.anneal, reset_every=a.reset_every, train_b_dec=not a.hold_b_dec, seed=a.seed,
    )  # fmt: skip


def _train(corpus: EmbeddingCorpus, arguments: argparse.Namespace) -> None:
    settings = settings_of(arguments, corpus.embed_dim)
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        raise JobError(f"--device {arguments.device}: this machine has no CUDA GPU; give --device cpu")
    trainer = Trainer(corpus, arguments.out, settings, arguments.device)
    print(
        f"{settings.architecture} {corpus.embed_dim} x {settings.d_sae} on {len(corpus)} rows, "
        f"{'sparse' if settings.sparse else 'dense'} kernels, from step {trainer.step}",
        flush=True,
    )
    # What a killed run logged after its checkpoint is logged again.
    with SummaryWriter(os.fspath(arguments.out / "tensorboard"), purge_step=trainer.step) as board:

        def watch(step: int, losses: Losses, figures: dict[str, float]) -> None:
            if step % arguments.log_every and trainer.progress < 1.0:
                return
            shown = {
                "loss": losses.total.item(), "explained_variance": 1 - float(losses.unexplained), "l0": losses.l0,
                "aux_loss": float(losses.auxiliary), "dead_share": figures["dead"], "rate": figures["rate"],
                "grad_norm": figures["grad_norm"],
            }  # fmt: skip
            for name, value in shown.items():
                board.add_scalar(f"train/{name}", value, step)
            print(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in shown.items()), flush=True)

        trainer.train(arguments.checkpoint_minutes, watch)
        _leave(trainer, corpus, arguments, board)


def _leave(trainer: Trainer, corpus: EmbeddingCorpus, arguments: argparse.Namespace, board: SummaryWriter) -> None:
    settings = trainer.settings
    metadata = {
        "trained_as": settings.architecture, "encoder_revision": corpus.encoder_revision, "corpus": corpus.card.name,
    }  # fmt: skip
    figures = trainer.write(arguments.out, arguments.statistics_rows, arguments.dtype, metadata)
    card = {name: value for name, value in dataclasses.asdict(corpus.card).items() if name != "shards"}
    report = {
        "settings": flat(settings), "seed": settings.seed, "corpus": card,
        "rows": len(corpus), "encoder_revision": corpus.encoder_revision, "steps": trainer.step,
        "seconds": round(trainer.elapsed, 1), "kernels": "sparse" if settings.sparse else "dense",
        "scale": trainer.scale, "figures": figures,
    }  # fmt: skip
    write_json(arguments.out / "training.json", report)
    for name, value in figures.items():
        board.add_scalar(f"final/{name}", value, trainer.step)
    print(f"{arguments.out}: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))


def _shares(text: str) -> tuple[float, ...]:
    shares = tuple(float(part) for part in text.split(","))
    if not shares or shares[-1] != 1 or list(shares) != sorted(set(shares)) or shares[0] <= 0:
        raise argparse.ArgumentTypeError(f"{text}: shares must rise from above 0 to 1")
    return shares
