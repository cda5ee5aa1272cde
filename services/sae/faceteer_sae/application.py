"""What the SAE service does for a call: in which order things are looked up, computed, measured and kept.

It decides when all features must be found (a *full pass* of the model) and when the edited ones are enough.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from faceteer_runtime.batching import MicroBatcher, ModelWorker
from faceteer_runtime.cache import Cache
from faceteer_runtime.cache_keys import FEATURES, cache_key
from faceteer_runtime.embeddings import Embedding, EmbeddingStore, Source
from faceteer_runtime.errors import FaceteerError, InvalidField
from faceteer_runtime.execution import Cost
from faceteer_runtime.memo import Memo
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.outcome import Computed, Failed, required

from faceteer_sae import edits as editing
from faceteer_sae import features as describing
from faceteer_sae.diff import (
    CARRIED_COVERAGE,
    DEFAULT_COVERAGE,
    FeatureDiff,
    check_coverage,
    diff_features,
    for_another,
)
from faceteer_sae.edit_warnings import edit_warnings
from faceteer_sae.edits import EditColumns, Edits, Measured
from faceteer_sae.features import Encoding, InputWarning, Origin, Strongest
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.settings import SaeSettings
from faceteer_sae.statistics import FeatureStatistics

R = TypeVar("R")

_DEFAULT_DRIFTED, _MOST_DRIFTED = 8, 1000
# Decoder rows that are worth a thread switch; fewer are combined at once, on the event loop, in under a millisecond.
_INLINE_ROWS = 2048


class Encoded(NamedTuple):
    """One embedding's features.

    Attributes:
        embedding: which.
        features: those that were asked for, strongest first.
        encoding: all of them, and how well they explain the embedding.
        error: x - x_hat, float32 [d_in], where it was asked for.
        cached: whether no model ran.
        warnings: what is odd about the embedding.
    """

    embedding: Embedding
    features: Strongest
    encoding: Encoding
    error: np.ndarray | None
    cached: bool
    warnings: list[InputWarning]


class Decoding(NamedTuple):
    """What is to be decoded: activations, float32 [m], of features, int64 [m], and an error, float32 [d_in], to add."""

    indices: np.ndarray
    activations: np.ndarray
    error: np.ndarray | None


class EditResult(NamedTuple):
    """What edits did.

    Attributes:
        embedding: the edited one.
        edits: those asked for, and the rivals that their SWITCHes turned off.
        activations: by name of the report's field ("before", "requested_scaled" ...), float32 [m], one an edit.
        delta_norm: ||x' - x||.
        cosine: cos(x, x').
        measured: achieved activations and drift, if they were measured.
        warnings: about the embedding and about the edits.
    """

    embedding: Embedding
    edits: Edits
    activations: dict[str, np.ndarray]
    delta_norm: float
    cosine: float
    measured: Measured | None
    warnings: list[InputWarning]


class SaeApplication:
    """The calls of SaeService, on arrays."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        statistics: FeatureStatistics | None,
        *,
        revision: str,
        encoder_revision: str,
        cache: Cache,
        worker: ModelWorker,
        metrics: Metrics,
        settings: SaeSettings,
        origin: Origin,
    ) -> None:
        self._sae, self._statistics, self._origin = sae, statistics, origin
        self._revision = revision
        self._worker = worker
        self._max_edits = settings.sae_max_edits
        self._embeddings = EmbeddingStore(cache, encoder_revision, sae.d_in)
        self._encodings: Memo[Encoding] = Memo(
            cache, describing.to_record, partial(describing.from_record, d_sae=sae.d_sae)
        )
        self._batcher: MicroBatcher[np.ndarray, Encoding] = MicroBatcher(
            partial(describing.encode, sae, statistics),
            max_batch=settings.sae_max_batch,
            max_queue=settings.max_queue,
            worker=worker,
            name="sae",
            metrics=metrics,
        )

    async def encode(
        self, sources: Sequence[Source | Failed], *, max_features: int = 0, include_error: bool = False
    ) -> tuple[list[Encoded | Failed], Cost]:
        """The features of each embedding, or why it has none; what has failed already stays failed.

        Raises:
            QueueFull, Draining: about the call as a whole.
        """
        embeddings, embeds_us = await self._embeddings.resolve_many(sources)
        found, features_us = await self._features_of([one.x for one in embeddings if not isinstance(one, Failed)])
        rest = iter(found)
        results: list[Encoded | Failed] = []
        for embedding in embeddings:
            if isinstance(embedding, Failed):
                results.append(embedding)
                continue
            outcome = next(rest)
            results.append(
                outcome
                if isinstance(outcome, Failed)
                else self._encoded(embedding, outcome, max_features, include_error)
            )
        return results, Cost.of(found, embeds_us + features_us)

    async def decode(self, items: Sequence[Decoding | Failed]) -> tuple[list[Embedding | Failed], Cost]:
        """The embedding of each item's features, or why it has none; what has failed already stays failed."""
        started = time.perf_counter()
        results: list[Embedding | Failed] = []
        for at, item in enumerate(items):
            if isinstance(item, Failed):
                results.append(item)
                continue
            x = await self._run(len(item.indices), self._sae.decode, item.indices, item.activations)
            if item.error is not None:
                x = x + item.error
            try:
                results.append(self._embeddings.keep(describing.check_size(x, f"items[{at}].features.activations")))
            except FaceteerError as error:
                results.append(Failed(error))
        return results, Cost(compute_us=int((time.perf_counter() - started) * 1e6))

    async def edit(
        self, source: Source, columns: EditColumns, *, measure: bool = False, max_drifted: int = 0
    ) -> tuple[EditResult, Cost]:
        """Edits one embedding: k dot products and k axpys, no full pass unless it is measured or TopK asks for one."""
        sae, statistics = self._sae, self._statistics
        edits = editing.check_edits(columns, d_sae=sae.d_sae, statistics=statistics, max_edits=self._max_edits)
        if max_drifted > _MOST_DRIFTED:
            raise InvalidField("max_drifted", f"must be at most {_MOST_DRIFTED}; 0 means {_DEFAULT_DRIFTED}")
        started = time.perf_counter()
        x = (await self._embeddings.resolve(source)).x
        key = self._key(x)
        known = await self._encodings.find(key)
        cache_us = int((time.perf_counter() - started) * 1e6)
        passes: list[Computed[Encoding]] = []
        if known is None and (measure or sae.fires_by_rank):
            passes.append(required(await self._encodings.compute(key, lambda: self._batcher.submit(x))))
            known = passes[-1].value
        before = (
            known.features.at(edits.indices)
            if known is not None
            else await self._run(len(edits.indices), sae.activations, x, edits.indices)
        )
        edited = await self._run(len(edits.indices), editing.apply_edits, sae, x, edits, before)
        measured, after = None, None
        if measure and known is not None:
            (again,), again_us = await self._features_of([edited.x])
            passes.append(required(again))
            after = passes[-1].value.features
            measured = editing.measure(known.features, after, edits.indices, max_drifted or _DEFAULT_DRIFTED)
            cache_us += again_us
        warnings = self._input_warnings(x, known)
        warnings += edit_warnings(columns, edits, edited, statistics, measured, after)
        activations = editing.activations(edits, edited, measured, statistics)
        result = EditResult(
            self._embeddings.keep(edited.x), edits, activations, edited.delta_norm, edited.cosine, measured, warnings
        )
        return result, Cost.of(passes, cache_us)

    async def diff(
        self, source: Source, target: Source, *, coverage: float = 0.0, max_edits: int = 0, another: bool = False
    ) -> tuple[FeatureDiff, Cost]:
        """The smallest set of edits that carries a share of the difference; 0 stands for the defaults.

        The edits are the source's own, or with ``another`` those for a third picture.
        """
        if max_edits > self._max_edits:
            raise InvalidField("max_edits", f"must be at most {self._max_edits}, or 0 for that")
        coverage = check_coverage(coverage, CARRIED_COVERAGE if another else DEFAULT_COVERAGE)
        embeddings, embeds_us = await self._embeddings.resolve_many([source, target])
        x_source, x_target = (required(embedding).x for embedding in embeddings)
        found, features_us = await self._features_of([x_source, x_target])
        f_source, f_target = (required(one).value.features for one in found)
        diff = await self._worker.run(
            diff_features, self._sae, x_source, x_target, f_source, f_target, coverage, max_edits or self._max_edits
        )
        if another:
            diff = for_another(diff, f_source, f_target, self._statistics)
        return diff, Cost.of(found, embeds_us + features_us)

    def close(self) -> None:
        """Refuses what still waits."""
        self._batcher.close()

    async def _features_of(self, x: Sequence[np.ndarray]) -> tuple[list[Computed[Encoding] | Failed], int]:
        """The features of each embedding, and the microseconds spent reading the cache."""
        return await self._encodings.of_many([self._key(one) for one in x], lambda at: self._batcher.submit(x[at]))

    def _key(self, x: np.ndarray) -> str:
        return cache_key(FEATURES, self._revision, x.tobytes())

    def _encoded(
        self, embedding: Embedding, found: Computed[Encoding], max_features: int, include_error: bool
    ) -> Encoded:
        encoding, features = found.value, found.value.features
        error = embedding.x - self._sae.decode(features.top_indices, features.top_acts) if include_error else None
        shown = describing.strongest(features, self._statistics, max_features)
        warnings = self._input_warnings(embedding.x, encoding)
        return Encoded(embedding, shown, encoding, error, found.cached, warnings)

    def _input_warnings(self, x: np.ndarray, encoding: Encoding | None) -> list[InputWarning]:
        found = describing.input_warnings(self._sae.config.metadata, x, encoding)
        if encoding is not None and not found:
            found = describing.novelty_warnings(self._statistics, encoding, self._origin)
        return found

    async def _run(self, rows: int, function: Callable[..., R], *arguments: object) -> R:
        """Here and now when it is quick, else on the model's thread."""
        if rows <= _INLINE_ROWS:
            return function(*arguments)
        return await self._worker.run(function, *arguments)
