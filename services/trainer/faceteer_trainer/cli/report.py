"""`python -m faceteer_trainer report-library --bundle B --out report.md`: how good a library's every part is."""

from __future__ import annotations

import argparse
from pathlib import Path

from faceteer_trainer.labels.report import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a .md file; a page with pictures is written beside it")


def run(arguments: argparse.Namespace) -> None:
    """Write the report, and print its Markdown."""
    print(write_report(arguments.bundle, arguments.out))
