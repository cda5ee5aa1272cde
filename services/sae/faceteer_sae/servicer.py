"""SaeService over gRPC: messages to arrays, arrays to messages.

Reports of hundreds of edits are written as wire bytes by numpy and parsed at once: setting 1,800 fields one by one in
Python would cost more than the edit itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
from faceteer.v1 import edits_pb2, execution_pb2, sae_pb2, sae_pb2_grpc, tensor_pb2
from faceteer_runtime.embeddings import Embedding, Source
from faceteer_runtime.errors import BatchTooLarge, InvalidField, UnknownFeature
from faceteer_runtime.execution import execution
from faceteer_runtime.outcome import Failed, attempt
from faceteer_runtime.status import error_to_item
from faceteer_runtime.tensors import to_array, to_embeds, to_tensor

from faceteer_sae.application import Decoding, EditResult, Encoded, SaeApplication
from faceteer_sae.edits import EditColumns, Edits
from faceteer_sae.features import LARGEST_VALUE, InputWarning, check_size

_EDIT_FIELDS = attrgetter("feature.index", "operation", "value", "unit")
_VARINT, _LEN, _FIXED32 = 0, 2, 5
# An outcome on the wire: tag and value alternate, a varint of 32 bits always in five bytes, so that all
# outcomes have one length. Parsers take padded varints (protobuf.dev, "Encoding": the value is what counts).


class SaeServicer(sae_pb2_grpc.SaeServiceServicer):
    """See protos/faceteer/v1/sae.proto."""

    def __init__(self, application: SaeApplication, card: sae_pb2.GetSaeResponse) -> None:
        """card: what GetSae answers; its limits are those that are kept here."""
        self._application = application
        self._card = card

    async def GetSae(self, request: sae_pb2.GetSaeRequest, context: Any) -> sae_pb2.GetSaeResponse:
        return self._card

    async def EncodeFeatures(
        self, request: sae_pb2.EncodeFeaturesRequest, context: Any
    ) -> sae_pb2.EncodeFeaturesResponse:
        self._check_batch("inputs", len(request.inputs))
        sources = [attempt(self._source, source, f"inputs[{at}]") for at, source in enumerate(request.inputs)]
        encoded, cost = await self._application.encode(
            sources, max_features=request.max_features, include_error=request.include_error
        )
        return sae_pb2.EncodeFeaturesResponse(
            results=[_encode_result(one) for one in encoded], execution=execution(self._card.revision, *cost)
        )

    async def DecodeFeatures(
        self, request: sae_pb2.DecodeFeaturesRequest, context: Any
    ) -> sae_pb2.DecodeFeaturesResponse:
        self._check_batch("items", len(request.items))
        items = [attempt(self._decoding, item, f"items[{at}]") for at, item in enumerate(request.items)]
        decoded, cost = await self._application.decode(items)
        results = [
            sae_pb2.DecodeFeaturesResult(error=error_to_item(one.error))
            if isinstance(one, Failed)
            else sae_pb2.DecodeFeaturesResult(embedding=_embedding(one, request.element_type))
            for one in decoded
        ]
        return sae_pb2.DecodeFeaturesResponse(results=results, execution=execution(self._card.revision, *cost))

    async def EditEmbeds(self, request: sae_pb2.EditEmbedsRequest, context: Any) -> sae_pb2.EditEmbedsResponse:
        result, cost = await self._application.edit(
            self._source(request.input, "input"),
            read_edits(request.edits),
            measure=request.measure,
            max_drifted=request.max_drifted,
        )
        answer = sae_pb2.EditEmbedsResponse(
            embedding=_embedding(result.embedding, request.element_type),
            execution=execution(self._card.revision, *cost),
        )
        # In place: as an argument, a report of hundreds of outcomes would be copied.
        write_report(answer.report, result)
        return answer

    async def DiffFeatures(self, request: sae_pb2.DiffFeaturesRequest, context: Any) -> sae_pb2.DiffFeaturesResponse:
        found, cost = await self._application.diff(
            self._source(request.source, "source"),
            self._source(request.target, "target"),
            coverage=request.coverage,
            max_edits=request.max_edits,
            another=request.for_another,
        )
        columns = (found.indices.tolist(), found.operations.tolist(), found.values.tolist())
        edits = [
            edits_pb2.Edit(
                feature=edits_pb2.FeatureRef(index=index),
                operation=operation,
                value=value,
                unit=edits_pb2.EDIT_UNIT_RAW,
            )
            for index, operation, value in zip(*columns, strict=True)
        ]
        return sae_pb2.DiffFeaturesResponse(
            edits=edits,
            coverage=found.coverage,
            differing_features=found.differing,
            unexplained=found.unexplained,
            shares=found.shares.tolist(),
            execution=execution(self._card.revision, *cost),
        )

    def _check_batch(self, field: str, items: int) -> None:
        if items == 0:
            raise InvalidField(field, "is empty; give at least one")
        if items > self._card.max_batch:
            raise BatchTooLarge(field, items, self._card.max_batch)

    def _source(self, source: tensor_pb2.EmbedsInput, field: str) -> Source:
        given = to_embeds(source, field=field, dim=self._card.d_in)
        return given if isinstance(given, str) else check_size(given, f"{field}.embeds.data")

    def _decoding(self, item: sae_pb2.DecodeItem, field: str) -> Decoding:
        indices, activations = read_features(item.features, f"{field}.features", self._card.d_sae)
        error = None
        if item.HasField("error"):
            error = to_array(item.error, field=f"{field}.error", shape=(self._card.d_in,))
            check_size(error, f"{field}.error.data")
        return Decoding(indices, activations, error)


# -- requests ------------------------------------------------------------------------------------


def read_edits(edits: Sequence[edits_pb2.Edit]) -> EditColumns:
    """The edits, column by column.

    Raises:
        InvalidField: an edit names no feature, or one by its label.
    """
    table = np.fromiter(chain.from_iterable(map(_EDIT_FIELDS, edits)), np.float64, 4 * len(edits)).reshape(-1, 4)
    indices, operations, units = (table[:, column].astype(np.int64) for column in (0, 1, 3))
    for at in np.flatnonzero(indices == 0).tolist():
        _check_reference(edits[at].feature, f"edits[{at}].feature")
    return EditColumns(indices, operations, table[:, 2], units)


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
        raise UnknownFeature(f"{field}.indices: no feature {indices[at]}; indices are below {d_sae}").at(
            f"{field}.indices[{at}]"
        )
    if len(np.unique(indices)) != len(indices):
        raise InvalidField(f"{field}.indices", "names a feature twice; name each once")
    good = np.abs(activations) <= LARGEST_VALUE
    if not good.all():
        at = int(np.argmin(good))
        raise InvalidField(f"{field}.activations[{at}]", f"must be finite and at most {LARGEST_VALUE:g}")
    return indices, activations


# -- answers -------------------------------------------------------------------------------------


def _encode_result(one: Encoded | Failed) -> sae_pb2.EncodeFeaturesResult:
    if isinstance(one, Failed):
        return sae_pb2.EncodeFeaturesResult(error=error_to_item(one.error))
    encoding, features = one.encoding, one.features
    return sae_pb2.EncodeFeaturesResult(
        encoding=sae_pb2.FeatureEncoding(
            embedding_id=one.embedding.embedding_id,
            features=tensor_pb2.SparseFeatures(
                indices=features.indices.tolist(),
                activations=features.raw.tolist(),
                scaled=features.scaled.tolist(),
            ),
            l0=encoding.l0,
            explained_variance=encoding.explained_variance,
            cosine=encoding.cosine,
            norm=encoding.norm,
            error=None if one.error is None else to_tensor(one.error),
            warnings=_warnings(one.warnings),
        ),
        cached=one.cached,
    )


def _embedding(one: Embedding, element_type: tensor_pb2.ElementType.ValueType) -> tensor_pb2.Embedding:
    return tensor_pb2.Embedding(embedding_id=one.embedding_id, embeds=to_tensor(one.x, element_type))


def _warnings(warnings: Iterable[InputWarning]) -> list[execution_pb2.Warning]:
    return [execution_pb2.Warning(**warning._asdict()) for warning in warnings]


def write_report(report: edits_pb2.EditReport, result: EditResult) -> None:
    """Writes what edits did into ``report``: named edits in order, then the rivals that SWITCHes turned off."""
    edits, measured = result.edits, result.measured
    named = int(np.count_nonzero(edits.rival_of < 0))
    wire = _outcomes(edits, result.activations, slice(0, named), rivals=False)
    if named < len(edits.indices):
        wire += _outcomes(edits, result.activations, slice(named, None), rivals=True)
    report.MergeFromString(wire)
    report.delta_norm, report.cosine = result.delta_norm, result.cosine
    report.warnings.extend(_warnings(result.warnings))
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
