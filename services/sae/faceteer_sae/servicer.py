"""SaeService over gRPC: messages to arrays, arrays to messages.

Knows nothing of how features are found or edits are made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from faceteer.v1 import edits_pb2, sae_pb2, sae_pb2_grpc, tensor_pb2
from faceteer_runtime.batching import ModelWorker
from faceteer_runtime.cache import Cache
from faceteer_runtime.cache_keys import embeds_content_id, embeds_key
from faceteer_runtime.errors import BatchTooLarge, EmbeddingExpired, FaceteerError, InvalidField, RevisionMismatch
from faceteer_runtime.execution import execution
from faceteer_runtime.status import error_to_status
from faceteer_runtime.tensors import to_array, to_tensor

from faceteer_sae import edits as editing
from faceteer_sae.diff import DEFAULT_COVERAGE, diff_features
from faceteer_sae.encodings import Encodings, Lookup
from faceteer_sae.features import LARGEST_VALUE, Encoding, input_warnings, strongest
from faceteer_sae.messages import read_edits, read_features, write_features, write_report, write_warnings
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.settings import SaeSettings
from faceteer_sae.statistics import FeatureStatistics

R = TypeVar("R")

_DEFAULT_DRIFTED, _MOST_DRIFTED = 8, 1000
_LARGEST_HALF = 65504.0
# 64 for a revision, 64 for a digest, and what joins them.
_LONGEST_ID = 129
# Decoder rows that are worth a thread switch; fewer are combined at once, on the event loop, in under a millisecond.
_INLINE_ROWS = 2048


class SaeIdentity(NamedTuple):
    """Whose SAE this is."""

    revision: str
    encoder_revision: str
    bundle: str


class _Input(NamedTuple):
    """An embedding that a request named or brought: float32 [d_in], and its id."""

    x: np.ndarray
    embedding_id: str


class SaeServicer(sae_pb2_grpc.SaeServiceServicer):
    """See protos/faceteer/v1/sae.proto."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        statistics: FeatureStatistics | None,
        identity: SaeIdentity,
        *,
        encodings: Encodings,
        cache: Cache,
        worker: ModelWorker,
        settings: SaeSettings,
    ) -> None:
        self._sae = sae
        self._statistics = statistics
        self._identity = identity
        self._encodings = encodings
        self._cache = cache
        self._worker = worker
        self._max_batch, self._max_edits = settings.sae_max_batch, settings.sae_max_edits

    async def GetSae(self, request: sae_pb2.GetSaeRequest, context: Any) -> sae_pb2.GetSaeResponse:
        return sae_pb2.GetSaeResponse(
            revision=self._identity.revision,
            bundle=self._identity.bundle,
            encoder_revision=self._identity.encoder_revision,
            architecture=self._sae.architecture,
            d_in=self._sae.d_in,
            d_sae=self._sae.d_sae,
            k=self._sae.k,
            has_statistics=self._statistics is not None,
            max_batch=self._max_batch,
            max_edits=self._max_edits,
        )

    async def EncodeFeatures(
        self, request: sae_pb2.EncodeFeaturesRequest, context: Any
    ) -> sae_pb2.EncodeFeaturesResponse:
        self._check_batch("inputs", len(request.inputs))
        inputs, embeds_us = await self._inputs(request.inputs)
        good = [one for one in inputs if isinstance(one, _Input)]
        lookups, features_us = await self._encodings.of_many([one.x for one in good])
        rest = iter(lookups)
        results = []
        for one in inputs:
            lookup = Lookup(one, True) if isinstance(one, Exception) else next(rest)
            if isinstance(one, Exception) or isinstance(lookup.encoding, Exception):
                results.append(sae_pb2.EncodeFeaturesResult(error=error_to_status(lookup.encoding)))  # type: ignore[arg-type]
            else:
                encoding = self._encoding(one, lookup.encoding, request)
                results.append(sae_pb2.EncodeFeaturesResult(encoding=encoding, cached=lookup.cached))
        return sae_pb2.EncodeFeaturesResponse(
            results=results, execution=self._execution(lookups, embeds_us + features_us)
        )

    async def DecodeFeatures(
        self, request: sae_pb2.DecodeFeaturesRequest, context: Any
    ) -> sae_pb2.DecodeFeaturesResponse:
        self._check_batch("items", len(request.items))
        started = time.perf_counter()
        results = []
        for at, item in enumerate(request.items):
            try:
                embedding = self._keep(await self._decode(item, f"items[{at}]"), request.element_type)
                results.append(sae_pb2.DecodeFeaturesResult(embedding=embedding))
            except FaceteerError as error:
                if error.field == "element_type":
                    raise
                results.append(sae_pb2.DecodeFeaturesResult(error=error_to_status(error)))
        compute_us = int((time.perf_counter() - started) * 1e6)
        return sae_pb2.DecodeFeaturesResponse(
            results=results, execution=execution(self._identity.revision, compute_us=compute_us)
        )

    async def EditEmbeds(self, request: sae_pb2.EditEmbedsRequest, context: Any) -> sae_pb2.EditEmbedsResponse:
        edits = editing.check_edits(
            *read_edits(request.edits),
            d_sae=self._sae.d_sae,
            statistics=self._statistics,
            max_edits=self._max_edits,
        )
        if request.max_drifted > _MOST_DRIFTED:
            raise InvalidField("max_drifted", f"must be at most {_MOST_DRIFTED}; 0 means {_DEFAULT_DRIFTED}")
        started = time.perf_counter()
        source = await self._input(request.input, "input")
        known = await self._encodings.known(source.x)
        cache_us = int((time.perf_counter() - started) * 1e6)
        ran: list[Lookup] = []
        if known is None and (request.measure or self._sae.architecture == "topk"):
            # Only topk cannot tell a feature's activation without the others; the rest needs one dot product each.
            ran.append(await self._encodings.of(source.x))
            known = _found(ran[-1])
        before = (
            known.features.at(edits.indices)
            if known is not None
            else await self._compute(len(edits.indices), self._sae.activations, source.x, edits.indices)
        )
        edited = await self._compute(len(edits.indices), editing.apply_edits, self._sae, source.x, edits, before)
        measured = None
        if request.measure and known is not None:
            ran.append(await self._encodings.of(edited.x))
            after = _found(ran[-1]).features
            measured = editing.measure(known.features, after, edits.indices, request.max_drifted or _DEFAULT_DRIFTED)
        norm = known.norm if known is not None else float(np.linalg.norm(source.x.astype(np.float64)))
        warnings = input_warnings(self._sae.config.metadata, norm, known.l0 if known is not None else None)
        warnings += editing.edit_warnings(edits, edited, self._statistics)
        answer = sae_pb2.EditEmbedsResponse(
            embedding=self._keep(edited.x, request.element_type), execution=self._execution(ran, cache_us)
        )
        # In place: as an argument, a report of hundreds of outcomes would be copied.
        write_report(answer.report, edits, edited, measured, self._statistics, warnings)
        return answer

    async def DiffFeatures(self, request: sae_pb2.DiffFeaturesRequest, context: Any) -> sae_pb2.DiffFeaturesResponse:
        if request.max_edits > self._max_edits:
            raise InvalidField("max_edits", f"must be at most {self._max_edits}, or 0 for that")
        coverage = request.coverage or DEFAULT_COVERAGE
        if not 0 < coverage <= 1:
            raise InvalidField("coverage", f"must lie in (0, 1], not {coverage:g}; 0 means {DEFAULT_COVERAGE}")
        started = time.perf_counter()
        source = await self._input(request.source, "source")
        target = await self._input(request.target, "target")
        embeds_us = int((time.perf_counter() - started) * 1e6)
        lookups, features_us = await self._encodings.of_many([source.x, target.x])
        f_source, f_target = (_found(lookup).features for lookup in lookups)
        found = await self._worker.run(
            diff_features,
            self._sae,
            source.x,
            target.x,
            f_source,
            f_target,
            coverage,
            request.max_edits or self._max_edits,
        )
        edits = [
            edits_pb2.Edit(
                feature=edits_pb2.FeatureRef(index=index),
                operation=edits_pb2.EDIT_OPERATION_ADD,
                value=value,
                unit=edits_pb2.EDIT_UNIT_RAW,
            )
            for index, value in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]
        return sae_pb2.DiffFeaturesResponse(
            edits=edits,
            coverage=found.coverage,
            differing_features=found.differing,
            unexplained=found.unexplained,
            execution=self._execution(lookups, embeds_us + features_us),
        )

    # -- inputs ----------------------------------------------------------------------------------

    def _check_batch(self, field: str, items: int) -> None:
        if items == 0:
            raise InvalidField(field, "is empty; give at least one")
        if items > self._max_batch:
            raise BatchTooLarge(field, items, self._max_batch)

    async def _input(self, source: tensor_pb2.EmbedsInput, field: str) -> _Input:
        """The embedding that a request names or brings.

        Raises:
            FaceteerError: there is none, it has expired, or its values cannot be used.
        """
        if source.WhichOneof("source") == "embedding_id":
            return self._by_id(source.embedding_id, await self._cache.get(embeds_key(source.embedding_id)), field)
        return self._inline(source, field)

    async def _inputs(self, sources: Sequence[tensor_pb2.EmbedsInput]) -> tuple[list[_Input | Exception], int]:
        """Every embedding, or why there is none; and the microseconds spent on one MGET for all ids."""
        by_id = {at: one.embedding_id for at, one in enumerate(sources) if one.WhichOneof("source") == "embedding_id"}
        started = time.perf_counter()
        records = await self._cache.get_many([embeds_key(one) for one in by_id.values()]) if by_id else []
        cache_us = int((time.perf_counter() - started) * 1e6)
        cached = dict(zip(by_id, records, strict=True))
        inputs: list[_Input | Exception] = []
        for at, source in enumerate(sources):
            try:
                field = f"inputs[{at}]"
                inputs.append(self._by_id(by_id[at], cached[at], field) if at in by_id else self._inline(source, field))
            except FaceteerError as error:
                inputs.append(error)
        return inputs, cache_us

    def _by_id(self, embedding_id: str, record: Any, field: str) -> _Input:
        x = None if record is None else record.get("embeds")
        if not isinstance(x, np.ndarray) or x.dtype != np.float32 or x.ndim != 1:
            # An error travels in metadata, which has a limit; an id of any length comes from outside.
            raise EmbeddingExpired(embedding_id[:_LONGEST_ID])
        encoder_revision = embedding_id.rpartition("-")[0]
        if encoder_revision != self._identity.encoder_revision or x.shape != (self._sae.d_in,):
            raise RevisionMismatch("encoder", encoder_revision, self._identity.encoder_revision)
        return _Input(x, embedding_id)

    def _inline(self, source: tensor_pb2.EmbedsInput, field: str) -> _Input:
        if source.WhichOneof("source") is None:
            raise InvalidField(field, "is missing; give embeds or an embedding_id")
        x = to_array(source.embeds, field=f"{field}.embeds", shape=(self._sae.d_in,))
        _check_size(x, f"{field}.embeds.data")
        embedding_id = embeds_content_id(self._identity.encoder_revision, x)
        self._cache.put(embeds_key(embedding_id), {"embeds": x})
        return _Input(x, embedding_id)

    # -- answers ---------------------------------------------------------------------------------

    def _encoding(
        self, source: _Input, encoding: Encoding, request: sae_pb2.EncodeFeaturesRequest
    ) -> sae_pb2.FeatureEncoding:
        features = encoding.features
        error = None
        if request.include_error:
            error = to_tensor(source.x - self._sae.decode(features.top_indices, features.top_acts))
        return sae_pb2.FeatureEncoding(
            embedding_id=source.embedding_id,
            features=write_features(*strongest(features, self._statistics, request.max_features)),
            l0=encoding.l0,
            explained_variance=encoding.explained_variance,
            cosine=encoding.cosine,
            norm=encoding.norm,
            error=error,
            warnings=write_warnings(input_warnings(self._sae.config.metadata, encoding.norm, encoding.l0)),
        )

    async def _decode(self, item: sae_pb2.DecodeItem, field: str) -> np.ndarray:
        indices, activations = read_features(item.features, f"{field}.features", self._sae.d_sae)
        x = await self._compute(len(indices), self._sae.decode, indices, activations)
        if item.HasField("error"):
            error = to_array(item.error, field=f"{field}.error", shape=(self._sae.d_in,))
            _check_size(error, f"{field}.error.data")
            x = x + error
        _check_size(x, f"{field}.features.activations")
        return x

    def _keep(self, x: np.ndarray, element_type: tensor_pb2.ElementType.ValueType) -> tensor_pb2.Embedding:
        """An embedding that was made here, named and cached so that later calls can use it by its id."""
        if element_type == tensor_pb2.ELEMENT_TYPE_FLOAT16 and np.abs(x).max() > _LARGEST_HALF:
            raise InvalidField("element_type", "this embedding does not fit float16; ask for float32")
        embeds = to_tensor(x, element_type)
        embedding_id = embeds_content_id(self._identity.encoder_revision, x)
        self._cache.put(embeds_key(embedding_id), {"embeds": x})
        return tensor_pb2.Embedding(embedding_id=embedding_id, embeds=embeds)

    async def _compute(self, rows: int, function: Callable[..., R], *arguments: Any) -> R:
        """Here and now when it is quick, else on the model's thread."""
        if rows <= _INLINE_ROWS:
            return function(*arguments)
        return await self._worker.run(function, *arguments)

    def _execution(self, lookups: Sequence[Lookup], cache_us: int) -> Any:
        return execution(
            self._identity.revision,
            cached=all(lookup.cached for lookup in lookups),
            queue_us=max((lookup.queue_us for lookup in lookups), default=0),
            compute_us=max((lookup.compute_us for lookup in lookups), default=0),
            cache_us=cache_us,
        )


def _found(lookup: Lookup) -> Encoding:
    if isinstance(lookup.encoding, Exception):
        raise lookup.encoding
    return lookup.encoding


def _check_size(x: np.ndarray, field: str) -> None:
    if not (np.abs(x) <= LARGEST_VALUE).all():
        raise InvalidField(field, f"holds values beyond {LARGEST_VALUE:g}, which no embedding comes near")
