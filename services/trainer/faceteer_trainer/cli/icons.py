"""`python -m faceteer_trainer draw-icons --bundle B`: an icon for each feature, and the causal score of every label."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from faceteer_runtime.icons import SEED, STRENGTHS

from faceteer_trainer.errors import JobError
from faceteer_trainer.icons import draw_library_icons


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--features", default="alive", help="alive, labelled, or numbers: 1,2,3")
    parser.add_argument("--strengths", default=",".join(map(str, STRENGTHS)), help="SCALED, left to right")
    parser.add_argument("--steps", type=int, help="12 by default, or the bundle's own if fewer")
    parser.add_argument("--guidance", type=float, help="4 by default, or the bundle's own if less")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--batch", type=int, default=24, help="pictures drawn together")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of the arithmetic on a CPU")


def run(arguments: argparse.Namespace) -> None:
    """Draw, and say how many."""
    a = arguments
    torch.set_num_threads(a.threads)
    began = time.monotonic()
    drawn, kept = draw_library_icons(
        a.bundle, a.features, strengths=_strengths(a.strengths), steps=a.steps, guidance=a.guidance, seed=a.seed,
        batch=a.batch, device=a.device,
    )  # fmt: skip
    print(f"{drawn:,} icons drawn in {time.monotonic() - began:.0f} s, {kept:,} were there already")


def _strengths(text: str) -> tuple[float, ...]:
    try:
        strengths = tuple(float(part) for part in text.split(","))
    except ValueError:
        strengths = ()
    if not 1 <= len(strengths) <= 8 or not all(-100 <= strength <= 100 for strength in strengths):
        raise JobError(f"--strengths {text}: must be one to eight numbers like 0.5,1,1.5")
    return strengths
