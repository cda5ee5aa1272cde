"""The trainer's command line: `python -m faceteer_trainer JOB --help` lists a job's options."""

from __future__ import annotations

from faceteer_trainer.cli.jobs import Job, run_job

# In the order in which a corpus becomes a served library.
JOBS = {
    "embed": Job("faceteer_trainer.cli.corpus", "a folder, tar shards or Parquet of pictures to embedding shards"),
    "train-sae": Job("faceteer_trainer.cli.train_sae", "train a sparse autoencoder on embedding shards"),
    "thin-sae": Job("faceteer_trainer.cli.thin_sae", "take near copies and idle latents out of an SAE"),
    "evaluate-sae": Job("faceteer_trainer.cli.evaluate_sae", "measure one or several SAEs on a corpus"),
    "import-sae": Job("faceteer_trainer.cli.import_sae", "an SAE in a published file format to a bundle's"),
    "export-sae": Job("faceteer_trainer.cli.export_sae", "a bundle's SAE to a file format that others read"),
    "build-library": Job("faceteer_trainer.cli.library", "a feature library from a corpus"),
    "learn-novelty": Job(
        "faceteer_trainer.cli.novelty", "what tells pictures unlike the corpus, for a bundle as it is"
    ),
    "label-library": Job("faceteer_trainer.cli.labels", "name a library's features, and score every name"),
    "draw-icons": Job("faceteer_trainer.cli.icons", "draw what turning each feature up causes"),
    "report-library": Job("faceteer_trainer.cli.report", "how good a library's every part is, as a page"),
    "export-onnx": Job("faceteer_trainer.cli.export_onnx", "a bundle's image encoder to a file for ONNX Runtime"),
    "bundles": Job("faceteer_trainer.cli.bundles", "pull, verify, list and describe bundles"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run one job."""
    run_job("python -m faceteer_trainer", JOBS, arguments)


if __name__ == "__main__":
    main()
