"""`python -m faceteer_postcards evaluate --bundle DIR`: every figure of the postcards report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from faceteer_postcards.evaluation.report import targets
from faceteer_postcards.evaluation.run import EvaluationSettings, evaluate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where the judge and the corpora are kept; else they are temporary")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Measure, and print the table of targets or everything."""
    torch.set_num_threads(1)  # the jobs use processes; two threads on a busy machine are slower than one
    results = evaluate(arguments.bundle, arguments.work, EvaluationSettings(workers=arguments.workers))
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        for measure, target, figure, reached in targets(results):
            print(f"{'ok  ' if reached else 'MISS'} {measure}: {figure} (target {target})")
