"""`python -m faceteer_trainer evaluate-sae`: one or several SAEs on one corpus, as a table, a plot and JSON."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from faceteer_runtime.bundle import Bundle
from faceteer_runtime.files import write_json, write_text
from rich.console import Console

from faceteer_trainer.cli.jobs import positive
from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.files import locked
from faceteer_trainer.progress import Progress
from faceteer_trainer.sae import comparison_report
from faceteer_trainer.sae.autoencoder import Autoencoder
from faceteer_trainer.sae.comparison import evaluate
from faceteer_trainer.sae.sampling import permuted

# Pictures whose names are compared when a judge's corpus should be of the same ones.
_NAMES_COMPARED = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="folder that embed made; preferably one that no SAE was trained on")
    add("--sae", type=Path, action="append", default=[], metavar="DIR", help="cfg.json + weights; may be repeated")
    add("--bundle", type=Path, action="append", default=[], metavar="DIR", help="a bundle, whose SAE; may be repeated")
    add("--out", type=Path, required=True, help="for results.json, comparison.md and comparison.png")
    add("--judge-corpus", type=Path, metavar="DIR", help="the same pictures embedded by another encoder, which says "
        "how alike two pictures are; without it the SAE's own encoder does")  # fmt: skip
    add("--rows", type=positive, default=50_000, help="spread over the corpus, the same for every SAE (50000)")
    add("--ms-rows", type=_not_negative, default=10_000, help="of these, for monosemanticity (10000); 0: none")
    add("--ms-least", type=_at_least_two, default=10, help="firings in them that a feature needs for a score (10)")
    add("--seed", type=int, default=0, help="of the choice of rows")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table and write it."""
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        raise JobError(f"--device {arguments.device}: this machine has no CUDA GPU; give --device cpu")
    corpus = EmbeddingCorpus.open(arguments.corpus)
    judge = _open_judge(arguments.judge_corpus, corpus)
    chosen = _named([*arguments.sae, *(_sae_of(bundle, corpus) for bundle in arguments.bundle)])
    if not chosen:
        raise JobError("no SAE was named; give --sae DIR or --bundle DIR, as often as there are SAEs to compare")
    indices = _rows(len(corpus), arguments.rows, arguments.seed)
    console = Console()
    with locked(arguments.out):
        results = {}
        for name, directory in chosen.items():
            results[name] = _evaluate(name, directory, corpus, judge, indices, arguments)
        report = {
            "corpus": {"name": corpus.card.name, "rows": len(corpus), "encoder_revision": corpus.encoder_revision},
            "rows": len(indices),
            "similarity": _judged_by(judge),
            "saes": results,
        }
        write_json(arguments.out / "results.json", report)
        write_text(arguments.out / "comparison.md", comparison_report.as_markdown(report))
        comparison_report.draw(results, f"{corpus.card.name}, {len(indices):,} pictures", arguments.out)
    # Wide enough for every column, whatever it is printed to.
    Console(width=max(console.width, 132)).print(comparison_report.as_table(report))
    print(f"{arguments.out}: results.json, comparison.md, comparison.png")


def _evaluate(
    name: str, directory: Path, corpus: EmbeddingCorpus, judge: EmbeddingCorpus | None,
    indices: npt.NDArray[np.int64], arguments: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    sae = Autoencoder.load(directory, arguments.device)
    if sae.d_in != corpus.embed_dim:
        raise JobError(
            f"{directory}: an SAE of {sae.d_in}-d embeddings, but {arguments.corpus} holds {corpus.embed_dim}-d"
        )
    made_by = sae.metadata.get("encoder_revision")
    if made_by is not None and made_by != corpus.encoder_revision:
        raise JobError(
            f"{directory}: trained on embeddings of encoder {made_by}, but {arguments.corpus} is of "
            f"{corpus.encoder_revision}; embed the pictures with that encoder"
        )
    with Progress() as report:
        found = evaluate(
            sae, corpus.rows, indices, judge=None if judge is None else judge.rows, judged_rows=arguments.ms_rows,
            progress=lambda rows: report(name, rows, len(indices)),
        )  # fmt: skip
    return {"directory": directory.name, "architecture": sae.architecture, "k": sae.k or None,
            **found.as_dict(arguments.ms_least)}  # fmt: skip


def _rows(total: int, wanted: int, seed: int) -> npt.NDArray[np.int64]:
    """Numbers of rows from all over the corpus, none twice, in an order that says nothing; all if there are few."""
    return permuted(np.arange(min(wanted, total)), total, (seed,))


def _open_judge(directory: Path | None, corpus: EmbeddingCorpus) -> EmbeddingCorpus | None:
    """The judge's embeddings.

    Raises:
        JobError: they are not of the same pictures.
    """
    if directory is None:
        return None
    judge = EmbeddingCorpus.open(directory)
    if len(judge) != len(corpus):
        raise JobError(
            f"{directory}: {len(judge)} rows, but the corpus has {len(corpus)}; embed the very same pictures with both "
            "encoders"
        )
    if judge.has_pictures and corpus.has_pictures:
        sample = np.linspace(0, len(corpus) - 1, min(len(corpus), _NAMES_COMPARED)).astype(np.int64)
        for number, ours, theirs in zip(sample, corpus.pictures(sample), judge.pictures(sample), strict=True):
            if ours.name != theirs.name:
                raise JobError(
                    f"{directory}: row {number} is of {theirs.name!r}, but in the corpus it is {ours.name!r}; embed "
                    "the very same pictures, in the same order"
                )
    return judge


def _judged_by(judge: EmbeddingCorpus | None) -> str:
    if judge is None:
        return "the SAE's own encoder (cosine of its embeddings)"
    return f"encoder {judge.encoder_revision} (cosine of its embeddings, {judge.embed_dim}-d)"


def _sae_of(directory: Path, corpus: EmbeddingCorpus) -> Path:
    """A bundle's SAE.

    Raises:
        BundleError: no bundle, or none with an SAE.
        JobError: of another encoder than the corpus.
    """
    part = Bundle.open(directory).part("sae")
    revision = part.facts.get("encoder_revision")
    if revision is not None and revision != corpus.encoder_revision:
        raise JobError(
            f"{directory}: its SAE is of encoder {revision}, but the corpus is of {corpus.encoder_revision}; embed the "
            "pictures with that bundle"
        )
    return part.path


def _named(directories: list[Path]) -> dict[str, Path]:
    """A short name for each: the folder's, or its parent's where it is called sae; numbered where two are alike."""
    found: dict[str, Path] = {}
    for directory in directories:
        whole = directory.resolve()
        name = whole.parent.name if whole.name == "sae" and whole.parent.name else whole.name
        number = 2
        while name in found:
            name, number = f"{name.rsplit(' #', 1)[0]} #{number}", number + 1
        found[name] = directory
    return found


def _not_negative(text: str) -> int:
    return _at_least(text, 0)


def _at_least_two(text: str) -> int:
    return _at_least(text, 2)


def _at_least(text: str, least: int) -> int:
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is below {least}")
    return int(text)
