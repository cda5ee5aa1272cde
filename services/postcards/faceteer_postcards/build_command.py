"""`python -m faceteer_postcards build --out DIR`: the bundle whole, or one step of it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from faceteer_trainer.errors import JobError
from faceteer_trainer.training import Budget

from faceteer_postcards.build import PRESETS, Workshop

_WHOLE = ("build", "assemble", "library")  # these write a bundle
STEPS = ("clip", "movq", "unet", "sharpen", "sae")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    parser.add_argument("--step", choices=(*STEPS, "assemble", "library"), default="build", help="only this one")
    parser.add_argument("--out", type=Path, help="where the bundle goes (the whole, assemble, library)")
    parser.add_argument("--work", type=Path, default=Path("runs/postcards"), help="corpora, checkpoints and logs")
    parser.add_argument("--preset", choices=("full", "trial"), default="full")
    parser.add_argument("--minutes", type=float, help="a step's budget, instead of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, help="processes; by default the cores there are, two at most")


def run(arguments: argparse.Namespace) -> None:
    """Run the step, and print where its result lies."""
    torch.set_num_threads(1)  # the jobs use processes; two threads on a busy machine are slower than one
    preset = PRESETS[arguments.preset]
    if arguments.minutes is not None:
        if arguments.step not in STEPS:
            raise JobError(f"--minutes is one step's budget; {arguments.step} has none of its own")
        preset = replace(preset, **{arguments.step: Budget(minutes=arguments.minutes)})
    if arguments.step in _WHOLE and arguments.out is None:
        raise JobError(f"{arguments.step} needs --out")
    workshop = Workshop(arguments.work, preset, arguments.seed, arguments.device, arguments.workers)
    if arguments.step in _WHOLE:
        print(getattr(workshop, arguments.step)(arguments.out))
    else:
        print(getattr(workshop, arguments.step)())
