"""The trainer's command line: one job a word, `python -m faceteer_trainer JOB --help` tells each job's options.

It knows only where each job lives. A job is a module with `add_arguments(parser)` and `run(arguments)`; only the one
that was asked for is imported.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from typing import NamedTuple

from faceteer_trainer.errors import JobError


class Job(NamedTuple):
    """Where a job lives, and what it is for."""

    module: str
    help: str


# In the order in which a corpus becomes a served library.
JOBS = {
    "embed": Job("corpus.command", "a folder, tar shards or Parquet of pictures to embedding shards"),
    "train-sae": Job("sae.train_command", "train a sparse autoencoder on embedding shards"),
    "evaluate-sae": Job("sae.evaluate_command", "measure one or several SAEs on a corpus, side by side"),
    "import-sae": Job("formats.import_command", "an SAE in a published file format to a bundle's"),
    "export-sae": Job("formats.export_command", "a bundle's SAE to a file format that others read"),
    "build-library": Job("library.command", "a feature library from a corpus: statistics, examples, related features"),
    "label-library": Job("labels.command", "name a library's features, and score every name on held-out pictures"),
    "draw-icons": Job("icons.command", "draw what turning each feature up causes, and score its label by that"),
    "report-library": Job("labels.report_command", "how good a library's every part is, as a page"),
    "bundles": Job("bundles.command", "pull, verify, list and describe bundles"),
    "postcards": Job("postcards.command", "make the postcards bundle, whole or by steps"),
    "evaluate": Job("evaluation.command", "measure a bundle against the truth of its pictures"),
}


def _listing() -> str:
    return "jobs:\n" + "\n".join(f"  {name:<14} {job.help}" for name, job in JOBS.items())


def main(arguments: list[str] | None = None) -> None:
    """Run one job."""
    parser = argparse.ArgumentParser(
        prog="python -m faceteer_trainer",
        description="Offline jobs.",
        epilog=_listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", choices=JOBS, metavar="JOB")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...")
    chosen = parser.parse_args(arguments)
    job = JOBS[chosen.job]
    warnings.filterwarnings("ignore", category=FutureWarning)
    module = importlib.import_module(f"faceteer_trainer.{job.module}")
    options = argparse.ArgumentParser(prog=f"python -m faceteer_trainer {chosen.job}", description=job.help)
    module.add_arguments(options)
    try:
        module.run(options.parse_args(chosen.rest))
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
