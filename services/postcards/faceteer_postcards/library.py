"""Makes the library of a bundle anew from fresh renders, by the jobs that anyone's pictures go through.

render ──► embed ──► build-library (and the SAE's statistics, of the same pictures) ──► label ──► icons, judged
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from faceteer_trainer.budget import Budget
from faceteer_trainer.corpus.embed import EmbedderSettings
from faceteer_trainer.corpus.run import EmbedSettings, embed_corpus
from faceteer_trainer.icons import draw_library_icons
from faceteer_trainer.labels.run import LabelSettings, label_library
from faceteer_trainer.library.measure import BuildSettings
from faceteer_trainer.library.run import build_library

from faceteer_postcards.corpus import draw_corpus, pack_pictures
from faceteer_postcards.evaluation.icon_judge import ClassifierJudge
from faceteer_postcards.evaluation.judge import train_judge

# Of corpora that no model of the bundle and no other judge was trained on.
LIBRARY_SEED, JUDGE_SEED = 106, 107
PICTURES, _JUDGE_PICTURES, _JUDGE_STEPS = 24_000, 16_000, 600


def rebuild_library(
    bundle: Path, work: Path, pictures: int = PICTURES, workers: int = 2, judge_steps: int = _JUDGE_STEPS
) -> None:
    """Gives a sealed bundle a new library, and its SAE the statistics of the same pictures.

    The factors are used for the captions shown beside pictures, and to train the classifier that judges icons; names
    are found from the pictures alone. That classifier is not the evaluation's: neither picks what the other measures.

    Args:
        bundle: with encoder, SAE and generator.
        work: for what is drawn; a second run goes on from there.
        pictures: to draw.
        workers: processes that draw; threads that embed.
        judge_steps: of the classifier's training.
    """
    work.mkdir(parents=True, exist_ok=True)
    packed, embedded = work / f"pictures-{pictures}.tar", work / f"embeds-{pictures}"
    if not packed.exists():
        pack_pictures(draw_corpus(work / "renders", pictures, LIBRARY_SEED, workers), pictures, packed)
    embed = EmbedSettings(EmbedderSettings(os.path.abspath(bundle)), name="postcards", workers=workers)
    embed_corpus(str(packed), embedded, embed)
    build_library(embedded, bundle, BuildSettings())
    label_library(bundle, embedded, LabelSettings(vocabulary="postcards"))
    renders = draw_corpus(work / "judge-renders", min(pictures, _JUDGE_PICTURES), JUDGE_SEED, workers)
    judge = train_judge(renders, work / "judge", Budget(steps=judge_steps), seed=1)
    draw_library_icons(bundle, judge=ClassifierJudge(judge))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    parser.add_argument("--bundle", type=Path, required=True, help="whose library and statistics are made anew")
    parser.add_argument("--work", type=Path, help="where renders and embeddings are kept; else they are temporary")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="to draw")
    parser.add_argument("--workers", type=int, default=2)


def run(arguments: argparse.Namespace) -> None:
    """Rebuild, and print where the library lies."""
    torch.set_num_threads(1)  # the jobs use processes; two threads on a busy machine are slower than one
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        rebuild_library(arguments.bundle, work, arguments.pictures, arguments.workers)
    print(arguments.bundle / "library" / "library.sqlite")
