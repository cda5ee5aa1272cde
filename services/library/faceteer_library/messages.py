"""The contract's messages to the library's queries, and its rows to messages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from faceteer.v1 import edits_pb2, library_pb2, tensor_pb2
from faceteer_runtime.errors import InvalidField

from faceteer_library.application import Reference
from faceteer_library.catalogue import Row
from faceteer_library.filters import Filter
from faceteer_library.naming import Kind, Match

SOURCES = {
    "": library_pb2.LABEL_SOURCE_UNSPECIFIED,
    "automatic": library_pb2.LABEL_SOURCE_AUTOMATIC,
    "model": library_pb2.LABEL_SOURCE_MODEL,
    "person": library_pb2.LABEL_SOURCE_PERSON,
}
JUDGES = {
    "": library_pb2.CAUSAL_JUDGE_UNSPECIFIED,
    "text_tower": library_pb2.CAUSAL_JUDGE_TEXT_TOWER,
    "classifier": library_pb2.CAUSAL_JUDGE_CLASSIFIER,
}
ORDERS = {
    library_pb2.FEATURE_ORDER_UNSPECIFIED: "index",
    library_pb2.FEATURE_ORDER_FIRING_SHARE_DESC: "firing_share",
    library_pb2.FEATURE_ORDER_DETECTION_SCORE_DESC: "detection_score",
    library_pb2.FEATURE_ORDER_MAX_ACTIVATION_DESC: "max",
    library_pb2.FEATURE_ORDER_LABEL: "label",
    library_pb2.FEATURE_ORDER_CAUSAL_SCORE_DESC: "causal_score",
    library_pb2.FEATURE_ORDER_SCORE_DISAGREEMENT_DESC: "score_disagreement",
}
SELECTIONS = {
    library_pb2.EXAMPLE_SELECTION_UNSPECIFIED: "strongest",
    library_pb2.EXAMPLE_SELECTION_STRONGEST: "strongest",
    library_pb2.EXAMPLE_SELECTION_QUANTILES: "quantiles",
}
_BOUNDS = (
    "min_firing_share",
    "max_firing_share",
    "min_detection_score",
    "max_detection_score",
    "min_causal_score",
    "max_causal_score",
)


def to_reference(reference: edits_pb2.FeatureRef, field: str) -> Reference:
    """The feature that the request's ``field`` names. Raises InvalidField where it names none."""
    match reference.WhichOneof("feature"):
        case "index":
            return Reference(reference.index, f"{field}.index")
        case "label" if reference.label.strip():
            return Reference(reference.label, f"{field}.label")
    raise InvalidField(field, "is missing; give index or label")


def to_filter(wanted: library_pb2.FeatureFilter) -> Filter:
    """The filter, without its safety classes.

    Raises:
        InvalidField: a bound that is no number, or a label source that is not in the contract.
    """
    given = {field.name: value for field, value in wanted.ListFields()}
    fields: dict[str, Any] = {name: given[name] for name in ("alive", "labelled", "scores_disagree", *_BOUNDS)
                              if name in given}  # fmt: skip
    for name in _BOUNDS:
        if math.isnan(fields.get(name, 0.0)):
            raise InvalidField(f"filter.{name}", "must be a number")
    names = {number: name for name, number in SOURCES.items()}
    for at, source in enumerate(wanted.label_sources):
        if source not in names:
            raise InvalidField(f"filter.label_sources[{at}]", f"{source} is not a label source of the contract")
    return Filter(**fields, sources=tuple(names[source] for source in wanted.label_sources))


def to_activations(features: tensor_pb2.SparseFeatures) -> tuple[np.ndarray, np.ndarray]:
    """(indices int64 [k], activations float32 [k]).

    Raises:
        InvalidField: lists of different lengths, an index twice, a negative or infinite activation.
    """
    indices = np.array(features.indices, np.int64)
    activations = np.array(features.activations, np.float32)
    if len(indices) != len(activations):
        raise InvalidField(
            "activations.activations", f"must be {len(indices)} values, one an index, not {len(activations)}"
        )
    for at in np.flatnonzero(~(np.isfinite(activations) & (activations >= 0)))[:1]:
        raise InvalidField(
            f"activations.activations[{at}]", f"must be finite and not negative, not {activations[at]:g}"
        )
    first = np.unique(indices, return_index=True)[1]
    for at in np.setdiff1d(np.arange(len(indices)), first)[:1]:
        raise InvalidField(f"activations.indices[{at}]", f"names feature {indices[at]} a second time")
    return indices, activations


def to_feature(row: Row) -> library_pb2.Feature:
    """A feature as the contract has it."""
    return library_pb2.Feature(
        index=row.index,
        label=row.label,
        label_source=SOURCES[row.source],
        alive=row.firing_share > 0,
        firing_share=row.firing_share,
        mean_activation=row.mean,
        p50=row.p50,
        p99=row.p99,
        max_activation=row.max,
        detection_score=row.detection_score,
        detection_balanced_accuracy=row.detection_balanced_accuracy,
        causal_score=row.causal_score,
        causal_judge=JUDGES[row.causal_judge],
        safety_class=row.safety_class,
        terms=row.terms,
        label_rank=row.label_rank,
        label_count=row.label_count,
    )


def to_match(match: Match) -> edits_pb2.FeatureMatch | None:
    """How a name led to a feature; None where there was no name."""
    if match.kind == Kind.NONE:
        return None
    kind: Any = int(match.kind)
    return edits_pb2.FeatureMatch(
        kind=kind, text=match.text, strength=match.strength, sharing=match.sharing, note=match.note
    )


def to_related(rows: Iterable[Sequence[Any]]) -> list[library_pb2.RelatedFeature]:
    """(index, label, score) as the contract has it."""
    return [library_pb2.RelatedFeature(index=index, label=label, score=score) for index, label, score in rows]
