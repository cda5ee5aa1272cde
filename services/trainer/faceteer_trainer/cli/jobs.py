"""Runs one of several jobs by its name. A job is a module with `add_arguments(parser)` and `run(arguments)`."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Mapping
from typing import NamedTuple

from faceteer_runtime.bundle import BundleError

from faceteer_trainer.errors import JobError


class Job(NamedTuple):
    """Where a job lives, and what it is for."""

    module: str
    help: str


def run_job(program: str, jobs: Mapping[str, Job], arguments: list[str] | None = None) -> None:
    """Run the job that the arguments name; only its module is imported, as some take seconds."""
    parser = argparse.ArgumentParser(
        prog=program,
        epilog="jobs:\n" + "\n".join(f"  {name:<14} {job.help}" for name, job in jobs.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", choices=jobs, metavar="JOB")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...")
    chosen = parser.parse_args(arguments)
    job = jobs[chosen.job]
    warnings.filterwarnings("ignore", category=FutureWarning)
    module = importlib.import_module(job.module)
    options = argparse.ArgumentParser(prog=f"{program} {chosen.job}", description=job.help)
    module.add_arguments(options)
    try:
        module.run(options.parse_args(chosen.rest))
    except (JobError, BundleError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def positive(text: str) -> int:
    """An option's whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number
