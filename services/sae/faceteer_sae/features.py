"""Figures about one embedding's features: how many, how well they explain it, and whether it looks right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from faceteer_runtime.errors import InvalidField
from faceteer_runtime.record import Record

from faceteer_sae.model import FeatureActivations, SparseAutoencoder
from faceteer_sae.statistics import FeatureStatistics

# How far outside the training corpus' first and last percent a value may lie before a warning: a wrong scale of the
# input is off by a factor of 10 to 40, an unusual picture hardly by half.
_NORM_SLACK, _L0_SLACK = 1.5, 3.0
# No CLIP model's embeddings come near this; beyond it, float32 sums of squares overflow.
LARGEST_VALUE = 1e6


class Encoding(NamedTuple):
    """One embedding's features and how well they explain it.

    Attributes:
        features: those that fire.
        l0: how many fire.
        explained_variance: ``1 - ||x - x_hat||^2 / ||x - mean||^2``.
        cosine: cos(x, x_hat).
        norm: ||x||.
        novelty: how unlike the corpus it is (:class:`faceteer_sae.novelty.Novelty`); NaN where the bundle cannot say.
    """

    features: FeatureActivations
    l0: int
    explained_variance: float
    cosine: float
    norm: float
    novelty: float = math.nan


class Strongest(NamedTuple):
    """Features, strongest first: int32 [m], RAW float32 [m], and SCALED float32 [m], empty without statistics."""

    indices: np.ndarray
    raw: np.ndarray
    scaled: np.ndarray


class InputWarning(NamedTuple):
    """Something the caller should know.

    Attributes:
        code: stable, for programs.
        message: for people.
        value: what was measured; 0 where the warning is not about a number.
        limit: what it passed.
        feature_indices: which features it is about.
    """

    code: str
    message: str
    value: float = 0.0
    limit: float = 0.0
    feature_indices: tuple[int, ...] = ()


class Origin(NamedTuple):
    """What a warning tells people of the bundle: its name, and a picture in it that it understands, "" for none."""

    bundle: str
    example: str = ""


def describe(
    sae: SparseAutoencoder, statistics: FeatureStatistics | None, x: np.ndarray, features: FeatureActivations
) -> Encoding:
    """L0, explained variance, cosine and norm of one embedding, float32 [d_in]. Costs L0 axpys, no full-width pass."""
    wide = x.astype(np.float64)
    x_hat = sae.decode(features.top_indices, features.top_acts).astype(np.float64)
    mean = statistics.embedding_mean if statistics is not None and statistics.embedding_mean is not None else sae.b_dec
    error, spread = wide - x_hat, wide - mean
    norm, total = float(np.linalg.norm(wide)), float(spread @ spread)
    novelty = statistics.novelty if statistics is not None else None
    return Encoding(
        features,
        len(features.top_indices),
        explained_variance(float(error @ error), total),
        cosine(wide, x_hat),
        norm,
        novelty.score(float(error @ error), spread) if novelty is not None else math.nan,
    )


def encode(sae: SparseAutoencoder, statistics: FeatureStatistics | None, x: list[np.ndarray]) -> list[Encoding]:
    """Features and their description of each embedding, float32 [d_in]; one pass of the model for all."""
    found = sae.encode(np.stack(x))
    return [describe(sae, statistics, one, features) for one, features in zip(x, found, strict=True)]


def explained_variance(squared_error: float, squared_distance: float) -> float:
    """``1 - sum |x - x_hat|^2 / sum |x - mean|^2``; 0 where every x is the mean and nothing is to be explained.

    The formula for one embedding and for many: see :class:`faceteer_sae.reconstruction.Reconstruction`.

    Args:
        squared_error: sum of |x - x_hat|^2.
        squared_distance: sum of |x - mean|^2, the mean being the corpus'.
    """
    return 1.0 - squared_error / squared_distance if squared_distance > 0 else 0.0


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """cos(a, b); 0 where one of them has no length."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    length = math.sqrt((wide_a @ wide_a) * (wide_b @ wide_b))
    return max(-1.0, min(1.0, float(wide_a @ wide_b) / length)) if length > 0 else 0.0


def strongest(features: FeatureActivations, statistics: FeatureStatistics | None, at_most: int = 0) -> Strongest:
    """The features in order of their SCALED activation where there are statistics, else of RAW; 0 returns all."""
    indices, raw = features.top_indices, features.top_acts
    scaled = statistics.scaled(indices, raw) if statistics is not None else np.empty(0, np.float32)
    order = np.argsort(-(scaled if statistics is not None else raw), kind="stable")
    if at_most:
        order = order[:at_most]
    return Strongest(indices[order], raw[order], scaled[order] if statistics is not None else scaled)


def input_warnings(metadata: Mapping[str, Any], x: np.ndarray, encoding: Encoding | None) -> list[InputWarning]:
    """What is odd about an embedding, by ``metadata["embedding_statistics"]`` of the SAE's cfg.json.

    Args:
        metadata: as SaeConfig has it; without the statistics nothing is odd.
        x: the embedding, float32 [d_in].
        encoding: its features, or None where they are not known: then only its norm is judged.
    """
    known = metadata.get("embedding_statistics")
    if not isinstance(known, Mapping):
        return []
    found = []
    norm = encoding.norm if encoding is not None else float(np.linalg.norm(x.astype(np.float64)))
    l0 = encoding.l0 if encoding is not None else None
    for name, value, slack, code, cause in (
        ("norm", norm, _NORM_SLACK, "NORM_OUT_OF_RANGE", "was it normalised, centred, or made by another encoder?"),
        ("l0", l0, _L0_SLACK, "L0_OUT_OF_RANGE", "wrong preprocessing or precision is the usual cause"),
    ):
        limits = known.get(name)
        if value is None or not isinstance(limits, Mapping) or not {"p01", "p99"} <= limits.keys():
            continue
        low, high = float(limits["p01"]), float(limits["p99"])
        if not low / slack <= value <= high * slack:
            what = "the embedding's norm" if name == "norm" else "the number of features that fire"
            message = f"{what} is {value:.4g}, the training corpus has {low:.4g} to {high:.4g}; {cause}"
            found.append(InputWarning(code, message, value, low if value < low else high))
    return found


def novelty_warnings(statistics: FeatureStatistics | None, encoding: Encoding, origin: Origin) -> list[InputWarning]:
    """Whether a picture is unlike those that the bundle was made from, in words for a person, with what to do."""
    novelty = statistics.novelty if statistics is not None else None
    if novelty is None or not encoding.novelty > (limit := float(novelty.limit[0])):
        return []
    explained, usual = encoding.explained_variance, novelty.usual_explained_variance
    figures = (
        "" if explained >= usual else f" (its features explain {explained:.1%} of it, {usual:.1%} of its own ones)"
    )
    example = f", such as {origin.example}" if origin.example else ""
    message = (
        f"This picture is unlike those that the bundle {origin.bundle!r} was made from{figures}, so edits will "
        f"probably not do what they say. Try one of its own pictures{example}, or a bundle made from pictures like "
        "yours (docs/your-own-library.md). If this is one of its own, a larger or less compressed file may help."
    )
    return [InputWarning("UNLIKE_THE_CORPUS", message, encoding.novelty, limit)]


def check_size(x: np.ndarray, field: str) -> np.ndarray:
    """``x`` itself.

    Raises:
        InvalidField: a value is beyond :data:`LARGEST_VALUE`, or not finite.
    """
    if not (np.abs(x) <= LARGEST_VALUE).all():
        raise InvalidField(field, f"holds values beyond {LARGEST_VALUE:g}, which no embedding comes near")
    return x


def to_record(encoding: Encoding) -> Record:
    """An encoding as the cache holds it."""
    features = encoding.features
    summary = (
        features.kth_pre_act, encoding.explained_variance, encoding.cosine, encoding.norm, encoding.novelty
    )  # fmt: skip
    return {
        "indices": features.top_indices,
        "activations": features.top_acts,
        "summary": np.array(summary, dtype=np.float64),
    }


def from_record(record: Record, d_sae: int) -> Encoding | None:
    """The encoding again; None for a record that is not of this form (another version's, say)."""
    indices, acts, summary = (record.get(name) for name in ("indices", "activations", "summary"))
    if not (isinstance(indices, np.ndarray) and isinstance(acts, np.ndarray) and isinstance(summary, np.ndarray)):
        return None
    if indices.dtype != np.int32 or acts.dtype != np.float32 or indices.shape != acts.shape or summary.shape != (5,):
        return None
    if len(indices) and (indices[0] < 0 or indices[-1] >= d_sae):
        return None
    kth_pre_act, *described = summary.tolist()
    return Encoding(FeatureActivations(indices, acts, kth_pre_act), len(indices), *described)
