"""The example world's command line: `python -m faceteer_postcards JOB --help` lists a job's options."""

from __future__ import annotations

from faceteer_trainer.cli.jobs import Job, run_job

JOBS = {
    "build": Job("faceteer_postcards.build", "make the postcards bundle, whole or one step of it"),
    "library": Job("faceteer_postcards.library", "make a bundle's library anew from fresh renders"),
    "refine": Job("faceteer_postcards.refine", "train a bundle's generator on, for sharper subjects"),
    "evaluate": Job("faceteer_postcards.evaluation.run", "measure a bundle against the truth of its pictures"),
    "sharpness": Job("faceteer_postcards.evaluation.sharpness", "how sharp bundles' subjects are, in dB"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run one job."""
    run_job("python -m faceteer_postcards", JOBS, arguments)


if __name__ == "__main__":
    main()
