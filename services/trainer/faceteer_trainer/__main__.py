"""The trainer's command line: `python -m faceteer_trainer postcards build --out DIR`, and `evaluate --bundle DIR`."""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from pathlib import Path

import torch

_WHOLE = ("build", "assemble", "library")  # these write a bundle
STEPS = ("clip", "movq", "unet", "sharpen", "sae")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m faceteer_trainer", description=__doc__)
    jobs = parser.add_subparsers(dest="job", required=True)
    postcards = jobs.add_parser("postcards", help="make the postcards bundle, whole or by steps")
    postcards.add_argument("step", choices=("build", *STEPS, "assemble", "library"))
    postcards.add_argument("--out", type=Path, help="where the bundle goes (build, assemble, library)")
    postcards.add_argument("--work", type=Path, default=Path("runs/postcards"), help="corpora, checkpoints and logs")
    postcards.add_argument("--preset", choices=("full", "trial"), default="full")
    postcards.add_argument("--minutes", type=float, help="a step's budget, instead of the preset's")
    postcards.add_argument("--seed", type=int, default=0)
    postcards.add_argument("--device", default="cpu", help="cpu or cuda")
    postcards.add_argument("--workers", type=int, help="processes; by default the cores there are, two at most")
    evaluate = jobs.add_parser("evaluate", help="measure a bundle against the truth of its pictures")
    evaluate.add_argument("--bundle", type=Path, required=True)
    evaluate.add_argument("--work", type=Path, help="where the judge and the corpora are kept; else they are temporary")
    evaluate.add_argument("--workers", type=int, default=2)
    evaluate.add_argument("--json", action="store_true", help="print every figure as JSON")
    return parser


def _postcards(arguments: argparse.Namespace) -> None:
    from faceteer_trainer.postcards.build import PRESETS, Workshop
    from faceteer_trainer.training import Budget

    preset = PRESETS[arguments.preset]
    if arguments.minutes is not None:
        if arguments.step not in STEPS:
            raise SystemExit(f"--minutes is one step's budget; {arguments.step} has none of its own")
        preset = replace(preset, **{arguments.step: Budget(minutes=arguments.minutes)})
    if arguments.step in _WHOLE and arguments.out is None:
        raise SystemExit(f"{arguments.step} needs --out")
    workshop = Workshop(arguments.work, preset, arguments.seed, arguments.device, arguments.workers)
    if arguments.step in _WHOLE:
        print(getattr(workshop, arguments.step)(arguments.out))
    else:
        print(getattr(workshop, arguments.step)())


def _evaluate(arguments: argparse.Namespace) -> None:
    from faceteer_trainer.evaluation.report import targets
    from faceteer_trainer.evaluation.run import EvaluationSettings, evaluate

    results = evaluate(arguments.bundle, arguments.work, EvaluationSettings(workers=arguments.workers))
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        for measure, target, figure, reached in targets(results):
            print(f"{'ok  ' if reached else 'MISS'} {measure}: {figure} (target {target})")


def main(arguments: list[str] | None = None) -> None:
    """Run one job."""
    parsed = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)  # the jobs use processes; two threads on a busy machine are slower than one
    if parsed.job == "postcards":
        _postcards(parsed)
    else:
        _evaluate(parsed)


if __name__ == "__main__":
    main()
