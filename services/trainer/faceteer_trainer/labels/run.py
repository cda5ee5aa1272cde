"""The labelling job: names for a library's features, and two scores for every name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from faceteer_encoder.model import ClipEncoder, load_encoder
from faceteer_encoder.preprocess import Preprocessor
from faceteer_library.editor import Described, LibraryEditor
from faceteer_runtime import bundle as bundle_format
from faceteer_runtime.bundle import Bundle
from faceteer_runtime.icons import TEMPLATE, icon_pictures, pack_template, unpack_template
from faceteer_sae.model import SparseAutoencoder

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.files import locked, writing
from faceteer_trainer.labels.naming import Named, name_features, strong_pictures
from faceteer_trainer.labels.quality import SAE_FIGURES, sae_figures
from faceteer_trainer.labels.safety import safety_class
from faceteer_trainer.labels.sample import Sample, take_sample
from faceteer_trainer.labels.scores import IconJudge, TextTowerJudge, detect
from faceteer_trainer.labels.vision_model import VisionModel
from faceteer_trainer.labels.vocabulary import CAPTIONS, DEFAULT, TextSpace, caption_terms, read_terms
from faceteer_trainer.library.templates import OTHER_TEMPLATE, least_in_common, scaled
from faceteer_trainer.library.writing import FOREIGN
from faceteer_trainer.progress import Progress

# Key in a library's meta: the mean subtracted from every text, packed as templates are.
TEXT_MEAN = "text_mean"
# Beside the library while a job changes it: the lock, and the vision model's answers.
WORK = ".label-library"
Report = Callable[[str, float], None]


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


@dataclass(frozen=True)
class Labelled:
    """What a labelling came to.

    Attributes:
        alive, labelled: live features, and those with a label.
        median_auc: of labels; NaN without any.
        foreign: whether the library is marked as one of pictures that the encoder does not know.
    """

    alive: int
    labelled: int
    median_auc: float
    foreign: bool


def label_library(
    bundle_directory: Path, corpus_directory: Path, settings: LabelSettings, device: str = "cpu"
) -> Labelled:
    """Names the bundle's features, scores every name, and seals the bundle.

    Raises:
        BundleError: no such bundle.
        JobError: bundle and corpus do not fit, there is no library, or the vision-language model cannot be asked.
    """
    bundle = Bundle.open(bundle_directory)
    encoder, preprocessor = load_encoder(bundle.part("encoder").path, device=device)
    sae = SparseAutoencoder.load(bundle.part("sae").path)
    corpus = EmbeddingCorpus.open(corpus_directory, encoder_revision=bundle.part("encoder").revision)
    _terms(settings.vocabulary)  # before the work begins
    with locked(bundle_directory / WORK), Progress() as report, writing(bundle_directory):
        report("encoding a sample", 0.0)
        sample = take_sample(corpus, sae, settings.sample, device)
        report("encoding a sample", 1.0)
        # Words from the side that labels are made from: the other side must stay unseen by every label.
        captions = _captions(corpus, sample.making.rows) if CAPTIONS in settings.vocabulary else None
        space = TextSpace(encoder, _terms(settings.vocabulary, captions))
        with edit_library(bundle_directory) as editor:
            _name(editor, sample, space, corpus, settings, report)
            _score_detection(editor, sample, space, report)
            score_icons(editor, encoder, preprocessor, space, report)
            for feature in editor.features() if settings.classes else ():
                editor.safety_class(feature.index, safety_class(feature.label, feature.terms, settings.classes))
            _choose_other_template(editor, sae, corpus, sample)
            embeds = corpus.rows(sample.judging.rows)
            editor.meta(SAE_FIGURES, json.dumps(sae_figures(sae, embeds, sample.judging.acts)))
            editor.meta(TEXT_MEAN, pack_template(space.mean))
            features = list(editor.features())
            foreign = FOREIGN in editor.facts
        bundle_format.seal(bundle_directory)
    aucs = [f.detection_score for f in features if f.label and f.detection_score is not None]
    return Labelled(
        sum(f.firing_share > 0 for f in features),
        sum(bool(f.label) for f in features),
        float(np.median(aucs)) if aucs else float("nan"),
        foreign,
    )


def edit_library(bundle_directory: Path) -> LibraryEditor:
    """The bundle's library, to be changed.

    Raises:
        JobError: there is none that can be.
    """
    try:
        return LibraryEditor(bundle_directory / "library" / "library.sqlite")
    except ValueError as error:
        raise JobError(str(error)) from None


def score_icons(
    editor: LibraryEditor,
    encoder: ClipEncoder,
    preprocessor: Preprocessor,
    space: TextSpace,
    report: Report,
    independent: IconJudge | None = None,
) -> None:
    """Causal scores of all labelled features that have an icon.

    ``independent`` judges the labels it knows, the bundle's text tower all others.
    """
    labelled = [feature for feature in editor.features() if feature.label]
    texts = sorted({feature.label for feature in labelled})
    if len(texts) < 2:
        return
    tower = TextTowerJudge(encoder, preprocessor, texts, space.of(texts))
    for done, feature in enumerate(labelled):
        icon = editor.icon_of(feature.index)
        judge: IconJudge = tower
        if independent is not None and independent.knows(feature.label):
            judge = independent
        score = None
        if icon is not None:
            webp, strengths = icon
            score = judge.score(icon_pictures(webp, 1 + len(strengths)), feature.label)
        editor.causal_score(feature.index, score, judge.name)
        report("judging icons", (done + 1) / len(labelled))


def space_of(editor: LibraryEditor, encoder: ClipEncoder) -> TextSpace:
    """The space in which labels were found and judged; of the default vocabulary where no job has labelled."""
    if TEXT_MEAN in editor.facts:
        return TextSpace(encoder, (), unpack_template(editor.facts[TEXT_MEAN]))
    return TextSpace(encoder, read_terms(DEFAULT))


def _name(
    editor: LibraryEditor,
    sample: Sample,
    space: TextSpace,
    corpus: EmbeddingCorpus,
    settings: LabelSettings,
    report: Report,
) -> None:
    """Names for the features that need one; those for which no good one is found have none."""
    wanted = [f for f in editor.features() if f.firing_share > 0 and (settings.overwrite or not f.label)]
    indices = np.array([feature.index for feature in wanted], np.int64)
    if settings.vision_model is None:
        source = "automatic"
        found = name_features(sample.making, space, indices, settings.least_z, settings.least_detection)
    else:
        source = "model"
        found = dict(_asked(settings.vision_model, sample, corpus, indices.tolist(), settings, report))
    for feature in wanted:
        named = found.get(feature.index)
        if named is not None:
            editor.label(feature.index, named.label, source=source, terms=named.terms)
        elif feature.label_source in ("", source):
            editor.label(feature.index, "")
    report("naming", 1.0)


def _asked(
    model: VisionModel,
    sample: Sample,
    corpus: EmbeddingCorpus,
    features: list[int],
    settings: LabelSettings,
    report: Report,
) -> Iterator[tuple[int, Named]]:
    """Names by the vision-language model, some calls at a time."""

    def ask(feature: int) -> Named | None:
        side = sample.making
        strong = strong_pictures(side, feature)[: settings.shown]
        if len(strong) == 0:
            return None
        firing, _ = side.fires(feature)
        silent = np.setdiff1d(np.arange(len(side.rows)), firing)
        others = np.random.default_rng(feature).choice(silent, min(settings.others, len(silent)), replace=False)
        pictures = [row.thumbnail for row in corpus.pictures(np.concatenate([side.rows[strong], side.rows[others]]))]
        if not all(pictures):
            raise JobError(
                "the corpus keeps no thumbnails, so the model has nothing to see; embed it with --thumbnails"
            )
        return model.name(pictures[: len(strong)], pictures[len(strong) :])

    with ThreadPoolExecutor(settings.parallel) as pool:
        for done, (feature, named) in enumerate(zip(features, pool.map(ask, features), strict=True)):
            if named is not None:
                yield feature, named
            report("asking the model", (done + 1) / len(features))


def _score_detection(editor: LibraryEditor, sample: Sample, space: TextSpace, report: Report) -> None:
    """Detection scores of all labels, on the judging side; and what each label means, for search."""
    labelled: list[Described] = [feature for feature in editor.features() if feature.label]
    texts = sorted({feature.label for feature in labelled})
    editor.forget_meanings()
    if not texts:
        return
    directions = dict(zip(texts, space.of(texts), strict=True))
    for text, embeds in zip(texts, space.raw(texts), strict=True):
        editor.meaning(text, embeds)
    for done, feature in enumerate(labelled):
        score = detect(sample.making, sample.judging, feature.index, directions[feature.label])
        editor.detection(feature.index, *(score or (None, None)))
        report("judging labels", (done + 1) / len(labelled))


def _choose_other_template(
    editor: LibraryEditor, sae: SparseAutoencoder, corpus: EmbeddingCorpus, sample: Sample
) -> None:
    """A second template for icons, for features that are on in the first."""
    if TEMPLATE not in editor.facts:
        return
    p99 = np.array([feature.p99 for feature in editor.features()], np.float32)
    first = scaled(sae, unpack_template(editor.facts[TEMPLATE]), p99)
    embeds = corpus.rows(sample.making.rows)
    chosen = least_in_common(first, sample.making.acts, p99, embeds, sample.mean)
    editor.meta(OTHER_TEMPLATE, pack_template(embeds[chosen]))


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
