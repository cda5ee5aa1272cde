"""Embeddings to features and back in batches: the SAE's two halves, item by item.

Knows nothing of how calls are made, nor of what features mean.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
from google.protobuf.message import Message

from faceteer._effects import Operation
from faceteer._errors import FaceteerError, InternalError, InvalidArgumentError
from faceteer._methods import DECODE_FEATURES, ENCODE_FEATURES, GET_STUDIO, Method
from faceteer._opening import Context, OpenedPhoto
from faceteer._retries import Attempts, call
from faceteer._status import error_from_status
from faceteer._tensors import to_array, to_tensor
from faceteer._values import UINT32_MAX, Notice
from faceteer.v1 import sae_pb2, studio_pb2, tensor_pb2

if TYPE_CHECKING:
    import numpy.typing as npt

T = TypeVar("T")
#: What becomes of an item that fails: "raise" its error (with ``.index``), or "return" it in the item's place.
OnItemError = Literal["raise", "return"]
# Embeddings of a call, whatever the server's limit says: a bounded message.
_MOST_ITEMS = 256


@dataclass(frozen=True)
class FeatureEncoding:
    """One embedding's features.

    Attributes:
        indices: int64 [l0], or [max_features] where fewer were asked for; strongest first.
        activations: float32, aligned with ``indices``, RAW.
        scaled: the same in units of each feature's 99th percentile; empty without statistics.
        l0: how many features fire in all.
        explained_variance: 1 - ||x - x_hat||^2 / ||x - mean||^2.
        cosine: cos(x, x_hat).
        norm: ||x||.
        error: x - x_hat, float32 [d], with ``include_error``; None otherwise.
        warnings: norm or l0 unlike those of the SAE's training corpus.
        cached: whether no model ran for it.
        embedding_id: names the embedding in later calls, while the server's cache keeps it.
    """

    indices: npt.NDArray[np.int64] = field(repr=False)
    activations: npt.NDArray[np.float32] = field(repr=False)
    scaled: npt.NDArray[np.float32] = field(repr=False)
    l0: int
    explained_variance: float
    cosine: float
    norm: float
    error: npt.NDArray[np.float32] | None = field(repr=False)
    warnings: tuple[Notice, ...]
    cached: bool
    embedding_id: str

    # Arrays have no single truth value, so two encodings are the same only when they are one.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @classmethod
    def from_proto(cls, message: sae_pb2.FeatureEncoding, cached: bool) -> FeatureEncoding:
        """From the wire."""
        return cls(
            indices=_frozen(message.features.indices, np.int64),
            activations=_frozen(message.features.activations, np.float32),
            scaled=_frozen(message.features.scaled, np.float32),
            l0=message.l0,
            explained_variance=message.explained_variance,
            cosine=message.cosine,
            norm=message.norm,
            error=to_array(message.error) if message.HasField("error") else None,
            warnings=tuple(Notice(w.code, w.message) for w in message.warnings),
            cached=cached,
            embedding_id=message.embedding_id,
        )

    def dense(self, d_sae: int) -> npt.NDArray[np.float32]:
        """All activations, float32 [d_sae], 0 where a feature is silent. Raises IndexError for too small a d_sae."""
        f = np.zeros(d_sae, np.float32)
        f[self.indices] = self.activations
        return f


#: What :meth:`Client.decode_features` takes for one item: an encoding (its error is added back) or {index: activation}.
Decodable: TypeAlias = "FeatureEncoding | Mapping[int, float]"


def encode_features(
    context: Context,
    inputs: Sequence[OpenedPhoto | npt.NDArray[Any]],
    *,
    max_features: int,
    include_error: bool,
    on_error: OnItemError,
    timeout: float | None,
) -> Operation[list[Any]]:
    """The features of many embeddings, in as many calls as the server's batch limit asks for."""
    _check(on_error)
    if max_features < 0:
        raise _invalid("max_features", f"{max_features} is negative; 0 keeps all that fire")
    # The values rather than ids: they never expire, and the server's cache knows them all the same.
    items = [_each(i, _encode_item, one) for i, one in enumerate(inputs)]

    def request(batch: Sequence[tensor_pb2.EmbedsInput]) -> sae_pb2.EncodeFeaturesRequest:
        return sae_pb2.EncodeFeaturesRequest(inputs=batch, max_features=max_features, include_error=include_error)

    def read(result: sae_pb2.EncodeFeaturesResult) -> FeatureEncoding:
        return FeatureEncoding.from_proto(result.encoding, result.cached)

    attempts = context.attempts(timeout, context.timeouts.open)
    return (yield from _batches(context, ENCODE_FEATURES, items, request, read, on_error, attempts))


def decode_features(
    context: Context, inputs: Sequence[Decodable], *, on_error: OnItemError, timeout: float | None
) -> Operation[Any]:
    """x_hat (plus the error where an encoding has it) of many sparse features: float32 [n, d], or a list."""
    _check(on_error)
    items = [_each(i, _decode_item, one) for i, one in enumerate(inputs)]

    def request(batch: Sequence[sae_pb2.DecodeItem]) -> sae_pb2.DecodeFeaturesRequest:
        return sae_pb2.DecodeFeaturesRequest(items=batch, element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32)

    def read(result: sae_pb2.DecodeFeaturesResult) -> npt.NDArray[np.float32]:
        return to_array(result.embedding.embeds)

    attempts = context.attempts(timeout, context.timeouts.open)
    rows = yield from _batches(context, DECODE_FEATURES, items, request, read, on_error, attempts)
    if on_error == "return":
        return rows
    if rows:
        return np.stack(rows)
    facts = yield from call(GET_STUDIO, studio_pb2.GetStudioRequest(), attempts)
    return np.empty((0, facts.sae.d_in), np.float32)


def embeddings_of(inputs: Any) -> list[Any]:
    """The items of what a user gives: one photo or embedding [d], several, or [n, d].

    Raises:
        InvalidArgumentError: it is none of these.
    """
    if hasattr(inputs, "_opened"):
        return [inputs._opened]
    if isinstance(inputs, np.ndarray):
        if inputs.ndim not in (1, 2):
            raise _invalid("embeds", f"an array of shape {list(inputs.shape)}; pass [d] or [n, d]")
        return [inputs] if inputs.ndim == 1 else list(inputs)
    if isinstance(inputs, Iterable) and not isinstance(inputs, str | bytes):
        return [getattr(one, "_opened", one) for one in inputs]
    raise _invalid("embeds", f"{type(inputs).__name__} is neither a photo nor embeddings; pass photos, [d] or [n, d]")


def decodables_of(inputs: Any) -> list[Any]:
    """The items of what a user gives: one encoding or mapping, or several. Raises InvalidArgumentError otherwise."""
    if isinstance(inputs, FeatureEncoding | Mapping):
        return [inputs]
    if isinstance(inputs, Iterable) and not isinstance(inputs, str | bytes | np.ndarray):
        return list(inputs)
    raise _invalid("features", f"{type(inputs).__name__} holds no features; pass FeatureEncodings or mappings")


def _batches(
    context: Context,
    method: Method[Any],
    items: Sequence[Message],
    build: Callable[[Any], Message],
    read: Callable[[Any], T],
    on_error: OnItemError,
    attempts: Attempts,
) -> Operation[list[Any]]:
    if not items:
        return []
    facts = yield from call(GET_STUDIO, studio_pb2.GetStudioRequest(), attempts)
    limit = min(facts.sae.max_batch or _MOST_ITEMS, _MOST_ITEMS)
    found: list[Any] = []
    for start in range(0, len(items), limit):
        batch = items[start : start + limit]
        answer = yield from call(method, build(batch), attempts)
        if len(answer.results) != len(batch):
            raise InternalError(f"the server sent {len(answer.results)} results for {len(batch)} items")
        for offset, result in enumerate(answer.results):
            if result.WhichOneof("result") != "error":
                found.append(read(result))
                continue
            error: FaceteerError = error_from_status(result.error, address=context.address)
            error.index = start + offset
            if on_error == "raise":
                raise error
            found.append(error)
    return found


def _each(index: int, make: Callable[[Any], T], one: Any) -> T:
    """``make(one)``, whose error says which item it was."""
    try:
        return make(one)
    except FaceteerError as error:
        error.index = index
        raise


def _encode_item(one: OpenedPhoto | npt.NDArray[Any]) -> tensor_pb2.EmbedsInput:
    return tensor_pb2.EmbedsInput(embeds=to_tensor(one.embeds if isinstance(one, OpenedPhoto) else one))


def _decode_item(one: Decodable) -> sae_pb2.DecodeItem:
    if isinstance(one, FeatureEncoding):
        features = tensor_pb2.SparseFeatures(indices=one.indices.tolist(), activations=one.activations.tolist())
        error = None if one.error is None else to_tensor(one.error)
        return sae_pb2.DecodeItem(features=features, error=error)
    if not isinstance(one, Mapping):
        raise _invalid("features", f"{type(one).__name__} holds no features; pass a FeatureEncoding or a mapping")
    indices, activations = [], []
    for index, activation in one.items():
        try:
            number, value = operator.index(index), float(activation)
        except (TypeError, ValueError):
            raise _invalid("features", f"{index!r}: {activation!r} is no feature's index with an activation") from None
        if not 0 <= number <= UINT32_MAX or not np.isfinite(np.float32(value)):
            raise _invalid("features", f"{index!r}: {activation!r} is no feature's index with a finite activation")
        indices.append(number)
        activations.append(value)
    return sae_pb2.DecodeItem(features=tensor_pb2.SparseFeatures(indices=indices, activations=activations))


def _frozen(values: Iterable[Any], dtype: Any) -> npt.NDArray[Any]:
    array = np.array(list(values), dtype)
    array.flags.writeable = False
    return array


def _check(on_error: str) -> None:
    if on_error not in ("raise", "return"):
        raise _invalid("on_error", f"{on_error!r} is unknown; pass raise or return")


def _invalid(field: str, description: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{field}: {description}", field=field, description=description)
