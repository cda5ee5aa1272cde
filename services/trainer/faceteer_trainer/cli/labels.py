"""`python -m faceteer_trainer label-library --bundle B --corpus DIR`: names for features, and scores for the names."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from faceteer_trainer.errors import JobError
from faceteer_trainer.labels.run import WORK, LabelSettings, label_library
from faceteer_trainer.labels.safety import read_classes
from faceteer_trainer.labels.vision_model import VisionModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    defaults = LabelSettings()
    add = parser.add_argument
    add("--bundle", type=Path, required=True)
    add("--corpus", type=Path, required=True, help="embeddings, made by embed with the same encoder")
    vocabulary = "files with one term a line, or general, composed, postcards, captions; several with commas between"
    add("--vocabulary", default=defaults.vocabulary, help=vocabulary)
    add("--sample", type=int, default=defaults.sample, help="pictures to look at, evenly over the corpus")
    add("--only", choices=("missing", "all"), default="all", help="features without a label, or all")
    add("--safety-classes", type=Path, help='JSON: {"class": ["word", ...]}')
    add("--endpoint", help="of a vision-language model with chat completions, https://host/v1; off if unset")
    add("--model", help="its name at the endpoint")
    add("--api-key-env", default="", help="the environment variable that holds its key")
    add("--device", default="cpu", help="cpu or cuda")


def run(arguments: argparse.Namespace) -> None:
    """Name and judge, and say how many."""
    torch.set_num_threads(1)
    vision_model = None
    if arguments.endpoint:
        if not arguments.model:
            raise JobError("--endpoint needs --model, the model's name there")
        key = os.environ.get(arguments.api_key_env, "") if arguments.api_key_env else ""
        if arguments.api_key_env and not key:
            raise JobError(f"--api-key-env {arguments.api_key_env}: that variable is not set")
        answers = arguments.bundle / WORK / "answers.jsonl"
        answers.parent.mkdir(exist_ok=True)
        vision_model = VisionModel(arguments.endpoint, arguments.model, answers, key)
    settings = LabelSettings(
        vocabulary=arguments.vocabulary,
        sample=arguments.sample,
        overwrite=arguments.only == "all",
        classes=read_classes(arguments.safety_classes) if arguments.safety_classes else {},
        vision_model=vision_model,
    )
    found = label_library(arguments.bundle, arguments.corpus, settings, arguments.device)
    print(
        f"{found.labelled:,} of {found.alive:,} live features have a label; on pictures they were not made from, "
        f"labels predict their features with a median AUC of {found.median_auc:.3f}"
    )
    if found.foreign:
        print(
            "The pictures are unlike those that the encoder knows: these scores say that it agrees with itself, "
            "no more."
        )
