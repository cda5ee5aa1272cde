"""Write a bundle's feature library: statistics, labels from captions' words, top examples with thumbnails, relatives.

The corpus' factors are used for one thing only: to write the captions. Labels are found from those words, never from
the factors themselves.
"""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from faceteer_runtime import bundle as bundle_format
from PIL import Image

from faceteer_trainer.evaluation.metrics import auc
from faceteer_trainer.labelling import CaptionIndex, Label, label_feature
from faceteer_trainer.postcards.bundle import seal_bundle
from faceteer_trainer.postcards.captions import describe
from faceteer_trainer.postcards.corpus import Corpus
from faceteer_trainer.sae.model import load_sae
from faceteer_trainer.sae.statistics import load_statistics

EXAMPLES = 12
RELATIVES = 12
LEAST_SCORE = 0.6  # a label that predicts its feature worse than this on other captions is none
Matrix = npt.NDArray[np.float32]


def write_captions(corpus: Corpus, count: int) -> list[str]:
    """A caption each for the first `count` pictures, naming five to eight of their factors."""
    return [describe(corpus.codes[i], np.random.default_rng((corpus.seed, i)), least=5).text for i in range(count)]


def thumbnail(picture: npt.NDArray[np.uint8]) -> bytes:
    """A picture as a lossless WebP file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", lossless=True, method=4)
    return buffer.getvalue()


def detection_score(label: Label, activations: npt.NDArray[np.float32], captions: list[str]) -> float | None:
    """AUC with which the label's words, found in captions it was not made from, predict the feature's activation."""
    words = (*label.text.split(", "), *label.terms)
    said = np.array([any(f" {word} " in f" {caption} " for word in words) for caption in captions])
    if not 10 <= said.sum() <= len(said) - 10:
        return None
    return auc(activations, said)


def scored_label(
    acts: npt.NDArray[np.float32], captions: list[str], learned: int, index: CaptionIndex
) -> tuple[Label | None, float | None]:
    """A feature's label from the first `learned` captions, and its score on the rest; none if it fails there."""
    label = label_feature(acts[:learned], index)
    score = detection_score(label, acts[learned:], captions[learned:]) if label else None
    if score is not None and score < LEAST_SCORE:
        return None, None
    return label, score


def lift(features: Matrix) -> Matrix:
    """How much more often two features fire together than independence would have it: [n, n]."""
    fires = (features > 0).astype(np.float32)
    share = fires.mean(0)
    expected = np.outer(share, share)
    return (fires.T @ fires / len(fires)) / np.maximum(expected, 1e-9)


def write_library(out: Path, corpus: Corpus, embeds: torch.Tensor, count: int) -> bool:
    """Write out/library/library.sqlite over the first `count` pictures of the corpus; embeds [>= count, d].

    Returns whether it was written: without the library service installed a bundle has none.
    """
    parent = importlib.util.find_spec("faceteer_library")
    if parent is None or importlib.util.find_spec("faceteer_library.writer") is None:
        print("faceteer_library is not installed: the bundle gets no library")
        return False
    from faceteer_library.writer import ExampleRow, FeatureRow, LibraryWriter

    sae = load_sae(out / "sae")
    statistics = load_statistics(out / "sae" / "feature_statistics.safetensors")
    with torch.no_grad():
        features = sae.encode(embeds[:count]).numpy()
    captions = write_captions(corpus, count)
    learned = count * 3 // 4  # labels are made from these and scored on the rest
    index = CaptionIndex(captions[:learned], least=max(2, learned // 1000))
    together = lift(features)
    cosines = (sae.W_dec @ sae.W_dec.T).detach().numpy()
    common = statistics.firing_share.numpy() >= 0.005
    seal_bundle(out, sae.d_in)  # the library names the SAE's revision
    revision = bundle_format.Bundle.open(out).part("sae").revision
    path = out / "library" / "library.sqlite"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with LibraryWriter(path, sae_revision=revision, corpus="postcards", n_pictures=count) as writer:
        for feature in range(sae.d_sae):
            acts = features[:, feature]
            positive = acts[acts > 0]
            label, score = scored_label(acts, captions, learned, index)
            top = np.argsort(-acts, kind="stable")[:EXAMPLES]
            counts, edges = np.histogram(positive, bins=16, range=(0.0, float(acts.max()) or 1.0))
            writer.feature(
                FeatureRow(
                    index=feature,
                    label=label.text if label else "",
                    firing_share=float((acts > 0).mean()),
                    mean=float(positive.mean()) if len(positive) else 0.0,
                    p50=float(np.median(positive)) if len(positive) else 0.0,
                    p99=float(statistics.p99[feature]),
                    max=float(acts.max()),
                    histogram_edges=edges[1:].astype(np.float32),
                    histogram_counts=counts.astype(np.int64),
                    detection_score=score,
                )
            )
            writer.examples(
                feature,
                [
                    ExampleRow(f"postcard-{row}", float(acts[row]), thumbnail(corpus.pictures[row]), captions[row])
                    for row in top
                    if acts[row] > 0
                ],
            )
            nearest = [int(other) for other in np.argsort(-cosines[feature])[1 : RELATIVES + 1]]
            writer.relatives(feature, "nearest", [(other, float(cosines[feature, other])) for other in nearest])
            friends = [int(o) for o in np.argsort(-together[feature]) if o != feature and common[o] and common[feature]]
            friends = [other for other in friends[:RELATIVES] if together[feature, other] > 1.2]
            writer.relatives(feature, "coactivating", [(other, float(together[feature, other])) for other in friends])
            rivals = statistics.rivals(feature)
            writer.relatives(feature, "rivals", [(other, float(together[feature, other])) for other in rivals])
    return True
