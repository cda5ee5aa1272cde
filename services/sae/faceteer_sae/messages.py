"""The contract's messages to arrays and back.

Knows nothing of the model. Reports of hundreds of edits are written as wire bytes by numpy and parsed in one go:
setting 1,800 fields one by one in Python would cost more than the edit itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
from faceteer.v1 import edits_pb2, execution_pb2, tensor_pb2
from faceteer_runtime.errors import InvalidField, UnknownFeature

from faceteer_sae.edits import Edited, Edits, Measured
from faceteer_sae.features import LARGEST_VALUE, InputWarning
from faceteer_sae.statistics import FeatureStatistics

_EDIT_FIELDS = attrgetter("feature.index", "operation", "value", "unit")
_VARINT, _LEN, _FIXED32 = 0, 2, 5
# An outcome as it lies on the wire: tag and value in turn, a varint of 32 bits always in five bytes, so that all
# outcomes have one length. Parsers take padded varints (protobuf.dev, "Encoding": the value is what counts).


def read_edits(edits: Sequence[edits_pb2.Edit]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Feature indices, operations, values and units of k edits: int64, int64, float64, int64, each [k].

    Raises:
        InvalidField: an edit names no feature, or one by its label.
    """
    table = np.fromiter(chain.from_iterable(map(_EDIT_FIELDS, edits)), np.float64, 4 * len(edits)).reshape(-1, 4)
    indices, operations, units = (table[:, column].astype(np.int64) for column in (0, 1, 3))
    for at in np.flatnonzero(indices == 0).tolist():
        _check_reference(edits[at].feature, f"edits[{at}].feature")
    return indices, operations, table[:, 2], units


def _check_reference(feature: edits_pb2.FeatureRef, field: str) -> None:
    kind = feature.WhichOneof("feature")
    if kind == "label":
        raise InvalidField(
            f"{field}.label", "SaeService knows features by index only; StudioService and LibraryService resolve labels"
        )
    if kind is None:
        raise InvalidField(field, "names no feature; give its index")


def read_features(features: tensor_pb2.SparseFeatures, field: str, d_sae: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices, int64 [m], and activations, float32 [m]. ``scaled`` is not read: it follows from these.

    Raises:
        InvalidField, UnknownFeature: lengths differ, an index is out of range or given twice, a value is not finite.
    """
    indices = np.array(features.indices, dtype=np.int64)
    activations = np.array(features.activations, dtype=np.float32)
    if len(indices) != len(activations):
        raise InvalidField(
            f"{field}.activations", f"must be aligned with indices: {len(activations)} values, {len(indices)} indices"
        )
    if len(indices) and indices.max() >= d_sae:
        at = int(np.argmax(indices >= d_sae))
        unknown = UnknownFeature(f"{field}.indices: no feature {indices[at]}; indices are below {d_sae}")
        unknown.field = f"{field}.indices[{at}]"
        raise unknown
    if len(np.unique(indices)) != len(indices):
        raise InvalidField(f"{field}.indices", "names a feature twice; each may stand there once")
    good = np.abs(activations) <= LARGEST_VALUE
    if not good.all():
        at = int(np.argmin(good))
        raise InvalidField(f"{field}.activations[{at}]", f"must be finite and at most {LARGEST_VALUE:g}")
    return indices, activations


def write_features(indices: np.ndarray, raw: np.ndarray, scaled: np.ndarray) -> tensor_pb2.SparseFeatures:
    """Aligned arrays as sparse features."""
    return tensor_pb2.SparseFeatures(indices=indices.tolist(), activations=raw.tolist(), scaled=scaled.tolist())


def write_warnings(warnings: Iterable[InputWarning]) -> list[execution_pb2.Warning]:
    """Warnings as messages."""
    return [execution_pb2.Warning(code=warning.code, message=warning.message) for warning in warnings]


def write_report(
    report: edits_pb2.EditReport,
    edits: Edits,
    edited: Edited,
    measured: Measured | None,
    statistics: FeatureStatistics | None,
    warnings: Iterable[InputWarning],
) -> None:
    """Writes what edits did into ``report``: named edits in order, then the rivals that SWITCHes turned off."""
    none = np.zeros(len(edits.indices), np.float32)

    def scaled(values: np.ndarray) -> np.ndarray:
        return none if statistics is None else statistics.scaled(edits.indices, values)

    floats = {
        "before": edited.before,
        "requested": edited.requested,
        "before_scaled": scaled(edited.before),
        "requested_scaled": scaled(edited.requested),
    }
    if measured is not None:
        floats |= {"achieved": measured.achieved, "achieved_scaled": scaled(measured.achieved)}
    named = int(np.count_nonzero(edits.rival_of < 0))
    wire = _outcomes(edits, floats, slice(0, named), rivals=False)
    if named < len(edits.indices):
        wire += _outcomes(edits, floats, slice(named, None), rivals=True)
    report.MergeFromString(wire)
    report.delta_norm, report.cosine = edited.delta_norm, edited.cosine
    report.warnings.extend(write_warnings(warnings))
    if measured is not None:
        report.measured, report.drift = True, measured.drift
        moves = (measured.drifted.tolist(), measured.drifted_before.tolist(), measured.drifted_after.tolist())
        for index, before, after in zip(*moves, strict=True):
            report.drifted.add(feature_index=index, before=before, after=after)


def _outcomes(edits: Edits, floats: dict[str, np.ndarray], part: slice, *, rivals: bool) -> bytes:
    """``EditReport.outcomes`` for some of the edits, as wire bytes."""
    indices = edits.indices[part]
    empty = _empty_outcome(tuple(floats), rivals)
    table = np.full(len(indices), empty, empty.dtype)
    table["feature_index"], table["operation"] = _varints(indices), edits.operations[part]
    for name, values in floats.items():
        table[name] = values[part]
    if rivals:
        table["rival_of"] = _varints(edits.rival_of[part])
    return table.tobytes()


@cache
def _empty_outcome(floats: tuple[str, ...], rivals: bool) -> np.ndarray:
    """One outcome with its tags in place and its values, the dtype's fields of the message's own names, 0."""
    kinds: dict[str, tuple[int, str | tuple[str, int]]] = {
        "feature_index": (_VARINT, ("u1", 5)),
        "operation": (_VARINT, "u1"),
        **dict.fromkeys(floats, (_FIXED32, "<f4")),
    }
    if rivals:
        kinds["rival_of"] = (_VARINT, ("u1", 5))
    layout: list[Any] = [("tag", "u1"), ("length", "u1")]
    for name, (_, value) in kinds.items():
        layout += [(f"{name} tag", "u1"), (name, value) if isinstance(value, str) else (name, *value)]
    outcome = np.zeros((), dtype=np.dtype(layout))
    outcome["tag"] = _tag(edits_pb2.EditReport.DESCRIPTOR.fields_by_name["outcomes"].number, _LEN)
    outcome["length"] = outcome.dtype.itemsize - 2
    fields = edits_pb2.EditOutcome.DESCRIPTOR.fields_by_name
    for name, (kind, _) in kinds.items():
        outcome[f"{name} tag"] = _tag(fields[name].number, kind)
    return outcome


def _tag(number: int, kind: int) -> int:
    """A field's tag; one byte for the numbers up to 15 that outcomes have."""
    return number << 3 | kind


def _varints(values: np.ndarray) -> np.ndarray:
    """Non-negative integers below 2^32 as varints of five bytes, uint8 [m, 5]."""
    digits = (values[:, None] >> np.arange(0, 35, 7)) & 0x7F
    digits[:, :4] |= 0x80
    return digits.astype(np.uint8)
