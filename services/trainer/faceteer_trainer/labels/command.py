"""`faceteer_trainer label-library --bundle B --corpus DIR`: names for features, and two scores for every name.

Knows the options and the order of things; how names are found and judged stands in the modules beside it.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from faceteer_encoder.model import ClipEncoder, load_encoder
from faceteer_encoder.preprocess import Preprocessor
from faceteer_library.editor import Described, LibraryEditor
from faceteer_runtime import bundle as bundle_format
from faceteer_runtime.bundle import Bundle, BundleError
from faceteer_runtime.icons import TEMPLATE, icon_pictures, pack_template, unpack_template
from faceteer_sae.model import SparseAutoencoder
from rich.console import Console

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.icons.templates import OTHER_TEMPLATE, scaled, unlike
from faceteer_trainer.labels.causal import causal_score, embed_pictures
from faceteer_trainer.labels.contrast import Named, name_features, strong_pictures
from faceteer_trainer.labels.detection import Detection, detect
from faceteer_trainer.labels.quality import SAE_FIGURES, sae_figures
from faceteer_trainer.labels.safety import read_classes, safety_class
from faceteer_trainer.labels.sample import Sample, take_sample
from faceteer_trainer.labels.vision_model import VisionModel
from faceteer_trainer.labels.vocabulary import CAPTIONS, DEFAULT, TextSpace, caption_terms, read_terms
from faceteer_trainer.library.steps import Steps
from faceteer_trainer.locks import locked

# The fact in a library's meta: what is taken off every text, packed as templates are.
TEXT_MEAN = "text_mean"


@dataclass(frozen=True)
class LabelSettings:
    """How features are named.

    Attributes:
        vocabulary: files of terms, or "general", "composed" or "postcards"; "captions" for the words of the corpus' own
            captions; several with commas between them.
        sample: pictures looked at.
        least_z: standard deviations by which a term must stand out to be a label.
        least_detection: AUC that a label must reach on the pictures it was made from; a worse one is none.
        overwrite: name features again that have an automatic label.
        classes: words of each safety class.
        vision_model: asked instead of the vocabulary; None for none.
        shown, others: pictures that it sees of each kind.
        parallel: calls to it at a time.
    """

    vocabulary: str = DEFAULT
    sample: int = 50_000
    least_z: float = 0.5
    least_detection: float = 0.65
    overwrite: bool = True
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    vision_model: VisionModel | None = None
    shown: int = 8
    others: int = 4
    parallel: int = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    defaults = LabelSettings()
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="embeddings, made by embed with the same encoder")
    parser.add_argument(
        "--vocabulary",
        default=defaults.vocabulary,
        help="files with one term a line, or general, composed, postcards, captions; several with commas between them",
    )
    parser.add_argument(
        "--sample", type=int, default=defaults.sample, help="pictures to look at, evenly over the corpus"
    )
    parser.add_argument("--only", choices=("missing", "all"), default="all", help="features without a label, or all")
    parser.add_argument("--safety-classes", type=Path, help='JSON: {"class": ["word", ...]}')
    parser.add_argument(
        "--endpoint", help="of a vision-language model with chat completions, https://host/v1; off if unset"
    )
    parser.add_argument("--model", help="its name at the endpoint")
    parser.add_argument("--api-key-env", default="", help="the environment variable that holds its key")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")


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
        answers = arguments.bundle / ".label-library" / "answers.jsonl"
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
        f"{found['labelled']:,} of {found['alive']:,} live features have a label; on pictures they were not made from, "
        f"labels predict their features with a median AUC of {found['median_auc']:.3f}"
    )


def label_library(
    bundle_directory: Path, corpus_directory: Path, settings: LabelSettings, device: str = "cpu"
) -> dict[str, float]:
    """Names the bundle's features, scores every name, and seals the bundle.

    Raises:
        JobError: bundle and corpus do not fit, there is no library, or the vision-language model cannot be asked.
    """
    try:
        bundle = Bundle.open(bundle_directory)
        encoder, preprocessor = load_encoder(bundle.part("encoder").path, device=device)
        sae = SparseAutoencoder.load(bundle.part("sae").path)
    except BundleError as error:
        raise JobError(str(error)) from None
    corpus = EmbeddingCorpus.open(corpus_directory, encoder_revision=bundle.part("encoder").revision)
    _terms(settings.vocabulary)  # before the work begins
    with locked(bundle_directory / ".label-library"), Steps(Console(stderr=True)) as steps:
        steps("encoding a sample", 0.0)
        sample = take_sample(corpus, sae, settings.sample, device)
        steps("encoding a sample", 1.0)
        # Words of the side that labels are made from: the other shall judge pictures that no label has seen.
        captions = _captions(corpus, sample.making.rows) if CAPTIONS in settings.vocabulary else None
        space = TextSpace(encoder, _terms(settings.vocabulary, captions))
        try:
            with LibraryEditor(bundle_directory / "library" / "library.sqlite") as editor:
                _name(editor, sample, space, corpus, settings, steps)
                _judge(editor, sample, space, steps)
                score_icons(editor, encoder, preprocessor, space, steps)
                _gate(editor, settings)
                _choose_other_template(editor, sae, corpus, sample)
                embeds = corpus.rows(sample.judging.rows)
                editor.meta(SAE_FIGURES, json.dumps(sae_figures(sae, embeds, sample.judging.acts)))
                editor.meta(TEXT_MEAN, pack_template(space.mean))
                figures = _figures(editor)
        except ValueError as error:
            raise JobError(str(error)) from None
        except OSError as error:
            raise JobError(f"{bundle_directory}: cannot be written ({error.strerror}); nothing has changed") from None
        bundle_format.seal(bundle_directory)
    return figures


def _name(
    editor: LibraryEditor,
    sample: Sample,
    space: TextSpace,
    corpus: EmbeddingCorpus,
    settings: LabelSettings,
    steps: Callable[[str, float], None],
) -> None:
    """Names for the features that want one; those for which no good one is found have none."""
    wanted = [
        feature
        for feature in editor.features()
        if feature.firing_share > 0 and (settings.overwrite or not feature.label)
    ]
    indices = np.array([feature.index for feature in wanted], np.int64)
    source = "automatic"
    if settings.vision_model is None:
        found = name_features(sample.making, space, indices, settings.least_z, settings.least_detection)
    else:
        source = "model"
        found = _ask(settings.vision_model, sample, corpus, indices, settings, steps)
    for feature in wanted:
        named = found.get(feature.index)
        if named is not None:
            editor.label(feature.index, named.label, source=source, terms=named.terms)
        elif feature.label_source in ("", source):
            editor.label(feature.index, "")
    steps("naming", 1.0)


def _ask(
    model: VisionModel,
    sample: Sample,
    corpus: EmbeddingCorpus,
    indices: np.ndarray,
    settings: LabelSettings,
    steps: Callable[[str, float], None],
) -> dict[int, Named]:
    """Names by the vision-language model, some calls at a time."""

    def ask(feature: int) -> Named | None:
        side = sample.making
        strong = strong_pictures(side, feature)[: settings.shown]
        if len(strong) == 0:
            return None
        firing, _ = side.fires(feature)
        silent = np.setdiff1d(np.arange(len(side.rows)), firing)
        others = np.random.default_rng(feature).choice(silent, min(settings.others, len(silent)), replace=False)
        rows = np.concatenate([side.rows[strong], side.rows[others]])
        pictures = [row.thumbnail for row in corpus.pictures(rows)]
        if not all(pictures):
            raise JobError(
                "the corpus keeps no thumbnails, so the model has nothing to see; embed it with --thumbnails"
            )
        return model.name(pictures[: len(strong)], pictures[len(strong) :])

    found: dict[int, Named] = {}
    with ThreadPoolExecutor(settings.parallel) as pool:
        for done, (feature, named) in enumerate(zip(indices.tolist(), pool.map(ask, indices.tolist()), strict=True)):
            if named is not None:
                found[feature] = named
            steps("asking the model", (done + 1) / len(indices))
    return found


def _judge(editor: LibraryEditor, sample: Sample, space: TextSpace, steps: Callable[[str, float], None]) -> None:
    """Detection scores of all labels, on the judging side; and what each label means, for search."""
    labelled = [feature for feature in editor.features() if feature.label]
    texts = sorted({feature.label for feature in labelled})
    editor.forget_meanings()
    if not texts:
        return
    directions = dict(zip(texts, space.of(texts), strict=True))
    for text, embeds in zip(texts, space.raw(texts), strict=True):
        editor.meaning(text, embeds)
    for done, feature in enumerate(labelled):
        judged = detect(sample.making, sample.judging, feature.index, directions[feature.label])
        _write_detection(editor, feature, judged)
        steps("judging labels", (done + 1) / len(labelled))


def _write_detection(editor: LibraryEditor, feature: Described, judged: Detection | None) -> None:
    editor.detection(
        feature.index,
        judged.auc if judged is not None else None,
        judged.balanced_accuracy if judged is not None else None,
    )


def score_icons(
    editor: LibraryEditor,
    encoder: ClipEncoder,
    preprocessor: Preprocessor,
    space: TextSpace,
    steps: Callable[[str, float], None],
) -> None:
    """Causal scores of all labelled features that have an icon."""
    labelled = [feature for feature in editor.features() if feature.label]
    texts = sorted({feature.label for feature in labelled})
    if len(texts) < 2:
        return
    directions, place = space.of(texts), {text: at for at, text in enumerate(texts)}
    for done, feature in enumerate(labelled):
        icon = editor.icon_of(feature.index)
        score = None
        if icon is not None:
            webp, strengths = icon
            embeds = embed_pictures(encoder, preprocessor, icon_pictures(webp, 1 + len(strengths)))
            score = causal_score(embeds, place[feature.label], directions)
        editor.causal_score(feature.index, score)
        steps("judging icons", (done + 1) / len(labelled))


def _gate(editor: LibraryEditor, settings: LabelSettings) -> None:
    if settings.classes:
        for feature in editor.features():
            editor.safety_class(feature.index, safety_class(feature.label, feature.terms, settings.classes))


def _choose_other_template(
    editor: LibraryEditor, sae: SparseAutoencoder, corpus: EmbeddingCorpus, sample: Sample
) -> None:
    """A second template for icons, for features that are on in the first."""
    if TEMPLATE not in editor.facts:
        return
    p99 = np.array([feature.p99 for feature in editor.features()], np.float32)
    first = scaled(sae, unpack_template(editor.facts[TEMPLATE]), p99)
    embeds = corpus.rows(sample.making.rows)
    chosen = unlike(first, sample.making.acts, p99, embeds, sample.mean)
    editor.meta(OTHER_TEMPLATE, pack_template(embeds[chosen]))


def _figures(editor: LibraryEditor) -> dict[str, float]:
    features = list(editor.features())
    scores = [feature.detection_score for feature in features if feature.label and feature.detection_score is not None]
    return {
        "alive": sum(feature.firing_share > 0 for feature in features),
        "labelled": sum(bool(feature.label) for feature in features),
        "median_auc": float(np.median(scores)) if scores else float("nan"),
    }


def space_of(editor: LibraryEditor, encoder: ClipEncoder) -> TextSpace:
    """The space in which labels were found and judged; of the default vocabulary where no job has labelled."""
    if TEXT_MEAN in editor.facts:
        return TextSpace(encoder, (), unpack_template(editor.facts[TEXT_MEAN]))
    return TextSpace(encoder, read_terms(DEFAULT))


def _captions(corpus: EmbeddingCorpus, rows: np.ndarray) -> list[str]:
    """Captions of pictures, a thousand at a time: their thumbnails come with them."""
    parts = (corpus.pictures(rows[start : start + 1024]) for start in range(0, len(rows), 1024))
    return [picture.caption for part in parts for picture in part]


def _terms(vocabulary: str, captions: Sequence[str] | None = None) -> tuple[str, ...]:
    """The terms of all parts of a vocabulary; without captions, those of its files."""
    parts = [part.strip() for part in vocabulary.split(",")]
    terms = read_terms(files) if (files := ",".join(part for part in parts if part != CAPTIONS)) else ()
    if CAPTIONS in parts and captions is not None:
        terms += caption_terms(captions)
    return tuple(dict.fromkeys(terms))
