"""Embeddings as features, as numbers: what ``encode_features`` gives and ``decode_features`` takes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np

from faceteer._errors import FaceteerError, invalid
from faceteer._models.tensors import to_array, to_tensor
from faceteer._models.values import UINT32_MAX, Notice
from faceteer._models.wire import copied
from faceteer.v1 import sae_pb2, tensor_pb2

if TYPE_CHECKING:
    import numpy.typing as npt

T = TypeVar("T")
#: What becomes of an item that fails: "raise" its error (with ``.index``), or "return" it in the item's place.
OnItemError = Literal["raise", "return"]


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
        warnings: the embedding, its norm or its l0 is unlike those of the corpus that the bundle was made from.
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
        return copied(
            cls,
            message,
            indices=_frozen(message.features.indices, np.int64),
            activations=_frozen(message.features.activations, np.float32),
            scaled=_frozen(message.features.scaled, np.float32),
            error=to_array(message.error) if message.HasField("error") else None,
            warnings=Notice.all_of(message.warnings),
            cached=cached,
        )

    def dense(self, d_sae: int) -> npt.NDArray[np.float32]:
        """All activations, float32 [d_sae], 0 where a feature is silent. Raises IndexError for too small a d_sae."""
        f = np.zeros(d_sae, np.float32)
        f[self.indices] = self.activations
        return f


#: What :meth:`Client.decode_features` takes for one item: an encoding (its error is added back) or {index: activation}.
Decodable: TypeAlias = "FeatureEncoding | Mapping[int, float]"


def encode_items(inputs: Any) -> list[tensor_pb2.EmbedsInput]:
    """What a user gives as messages: one photo or embedding [d], several, or [n, d].

    The values travel rather than ids: they never expire, and the server's cache recognises them too.

    Raises:
        InvalidArgumentError: it is none of these; ``index`` says which item.
    """
    if isinstance(inputs, np.ndarray) and inputs.ndim not in (1, 2):
        raise invalid("embeds", f"an array of shape {list(inputs.shape)}; pass [d] or [n, d]")
    if hasattr(inputs, "embeds") or (isinstance(inputs, np.ndarray) and inputs.ndim == 1):
        inputs = [inputs]
    if not isinstance(inputs, Iterable) or isinstance(inputs, str | bytes):
        kind = type(inputs).__name__
        raise invalid("embeds", f"{kind} is neither a photo nor embeddings; pass photos, [d] or [n, d]")
    return _each(inputs, lambda one: tensor_pb2.EmbedsInput(embeds=to_tensor(getattr(one, "embeds", one))))


def decode_items(inputs: Any) -> list[sae_pb2.DecodeItem]:
    """What a user gives as messages: one encoding or mapping, or several. Raises as :func:`encode_items` does."""
    if isinstance(inputs, FeatureEncoding | Mapping):
        inputs = [inputs]
    if not isinstance(inputs, Iterable) or isinstance(inputs, str | bytes | np.ndarray):
        raise invalid("features", f"{type(inputs).__name__} holds no features; pass FeatureEncodings or mappings")
    return _each(inputs, _decode_item)


def _each(items: Iterable[Any], make: Callable[[Any], T]) -> list[T]:
    """Every item made, and an error that says which item it was."""
    made = []
    for index, item in enumerate(items):
        try:
            made.append(make(item))
        except FaceteerError as error:
            error.index = index
            raise
    return made


def _decode_item(one: Decodable) -> sae_pb2.DecodeItem:
    if isinstance(one, FeatureEncoding):
        features = tensor_pb2.SparseFeatures(indices=one.indices.tolist(), activations=one.activations.tolist())
        error = None if one.error is None else to_tensor(one.error)
        return sae_pb2.DecodeItem(features=features, error=error)
    if not isinstance(one, Mapping):
        raise invalid("features", f"{type(one).__name__} holds no features; pass a FeatureEncoding or a mapping")
    indices, activations = [], []
    for index, activation in one.items():
        try:
            number, value = operator.index(index), float(activation)
        except (TypeError, ValueError):
            raise invalid("features", f"{index!r}: {activation!r} is no feature's index with an activation") from None
        if not 0 <= number <= UINT32_MAX or not np.isfinite(np.float32(value)):
            raise invalid("features", f"{index!r}: {activation!r} is no feature's index with a finite activation")
        indices.append(number)
        activations.append(value)
    return sae_pb2.DecodeItem(features=tensor_pb2.SparseFeatures(indices=indices, activations=activations))


def _frozen(values: Iterable[Any], dtype: Any) -> npt.NDArray[Any]:
    array = np.array(list(values), dtype)
    array.flags.writeable = False
    return array
