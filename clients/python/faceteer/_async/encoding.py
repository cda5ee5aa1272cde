"""Pictures, texts and features as arrays of numbers, many at a time."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Sequence, Sized
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from faceteer._async.bulk import AsyncBulk, OnError
from faceteer._async.connection import AsyncConnection
from faceteer._async.photo import AsyncPhoto
from faceteer._errors import FaceteerError, invalid
from faceteer._models.encoding import Decodable, FeatureEncoding, OnItemError, decode_items, encode_items
from faceteer._models.pictures import Picture
from faceteer._models.tensors import to_array
from faceteer._transport.methods import DECODE_FEATURES, ENCODE_FEATURES, ENCODE_TEXTS, Method
from faceteer._transport.retries import Attempts
from faceteer._views.progress import Bar, ProgressOption
from faceteer.v1 import encoder_pb2, sae_pb2, tensor_pb2

if TYPE_CHECKING:
    import numpy.typing as npt

# Embeddings of a call, whatever the server's limit says: a bounded message.
_MOST_ITEMS = 256


class AsyncEncoder:
    """The client's calls that give arrays."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def encode(
        self,
        pictures: Iterable[Picture] | AsyncIterable[Picture],
        *,
        batch_size: int = 32,
        progress: ProgressOption = False,
        on_error: OnError = "raise",
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """The embeddings of many pictures, float32 [n, d], in their order. Nothing but the embeddings is kept.

        Args:
            pictures: an iterable or an async one, read as the server takes them, at most 2 * batch_size at a time.
            batch_size: pictures that the server should have available at once.
            progress: True shows a bar in a notebook or on a terminal; a function is called with (done, total or None).
            on_error: "raise" the first error, with ``.index``; "skip" the row; "nan"; or a function of (index, error).
            timeout: seconds for all of them; None (the default) only bounds how long an answer may take.
        """
        total = len(pictures) if isinstance(pictures, Sized) else None
        bar = Bar(progress, "encoding", total)
        bulk = AsyncBulk(
            self._connection, pictures, batch_size=batch_size, bar=bar, total=total, on_error=on_error, timeout=timeout
        )
        return await bulk.encode()

    async def encode_texts(self, texts: Sequence[str], *, timeout: float | None = None) -> npt.NDArray[np.float32]:
        """The embeddings of texts in the pictures' space, float32 [n, d]. NotInBundleError without a text tower."""
        if isinstance(texts, str):
            raise invalid("texts", "one string; pass a list of strings")
        attempts = self._connection.attempts(timeout, self._connection.timeouts.open)
        facts = (await self._connection.facts(attempts)).encoder
        texts = list(texts)
        results = await self._connection.call_in_batches(
            ENCODE_TEXTS,
            texts,
            lambda batch: encoder_pb2.EncodeTextsRequest(texts=batch),
            facts.max_batch or len(texts) or 1,
            attempts,
        )
        rows = [to_array(result.embedding.embeds) for result in results]
        return np.stack(rows) if rows else np.empty((0, facts.embed_dim), np.float32)

    @overload
    async def encode_features(
        self,
        embeds: AsyncPhoto | npt.NDArray[Any] | Iterable[AsyncPhoto | npt.NDArray[Any]],
        *,
        max_features: int = 0,
        include_error: bool = False,
        on_error: Literal["raise"] = "raise",
        timeout: float | None = None,
    ) -> list[FeatureEncoding]: ...
    @overload
    async def encode_features(
        self,
        embeds: AsyncPhoto | npt.NDArray[Any] | Iterable[AsyncPhoto | npt.NDArray[Any]],
        *,
        max_features: int = 0,
        include_error: bool = False,
        on_error: Literal["return"],
        timeout: float | None = None,
    ) -> list[FeatureEncoding | FaceteerError]: ...
    async def encode_features(
        self,
        embeds: AsyncPhoto | npt.NDArray[Any] | Iterable[AsyncPhoto | npt.NDArray[Any]],
        *,
        max_features: int = 0,
        include_error: bool = False,
        on_error: OnItemError = "raise",
        timeout: float | None = None,
    ) -> Any:
        """The features of embeddings, as numbers, without names: one :class:`FeatureEncoding` each.

        Args:
            embeds: a photo, an embedding [d], embeddings [n, d], or several of these.
            max_features: only this many of the strongest; 0 for all that fire.
            include_error: also the reconstruction error, which :meth:`decode_features` adds back.
            on_error: "raise" the first item's error, with ``.index``; "return" errors in their items' places.
            timeout: seconds for all of them.
        """
        _check_on_error(on_error)
        if max_features < 0:
            raise invalid("max_features", f"{max_features} is negative; 0 keeps all that fire")

        def request(batch: Sequence[tensor_pb2.EmbedsInput]) -> sae_pb2.EncodeFeaturesRequest:
            return sae_pb2.EncodeFeaturesRequest(inputs=batch, max_features=max_features, include_error=include_error)

        items = encode_items(embeds)
        attempts = self._connection.attempts(timeout, self._connection.timeouts.open)
        results = await self._sae_batches(ENCODE_FEATURES, items, request, on_error, attempts)
        return [
            one if isinstance(one, FaceteerError) else FeatureEncoding.from_proto(one.encoding, one.cached)
            for one in results
        ]

    @overload
    async def decode_features(
        self,
        features: Decodable | Iterable[Decodable],
        *,
        on_error: Literal["raise"] = "raise",
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]: ...
    @overload
    async def decode_features(
        self, features: Decodable | Iterable[Decodable], *, on_error: Literal["return"], timeout: float | None = None
    ) -> list[npt.NDArray[np.float32] | FaceteerError]: ...
    async def decode_features(
        self,
        features: Decodable | Iterable[Decodable],
        *,
        on_error: OnItemError = "raise",
        timeout: float | None = None,
    ) -> Any:
        """Features to embeddings, float32 [n, d]: W_dec f + b_dec, and the error where an encoding brings it.

        Args:
            features: a :class:`FeatureEncoding`, a mapping of indices to activations (RAW), or several of these.
            on_error: as for :meth:`encode_features`; with "return" the answer is a list.
            timeout: seconds for all of them.
        """
        _check_on_error(on_error)

        def request(batch: Sequence[sae_pb2.DecodeItem]) -> sae_pb2.DecodeFeaturesRequest:
            return sae_pb2.DecodeFeaturesRequest(items=batch, element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32)

        items = decode_items(features)
        attempts = self._connection.attempts(timeout, self._connection.timeouts.open)
        results = await self._sae_batches(DECODE_FEATURES, items, request, on_error, attempts)
        if on_error == "return":
            return [one if isinstance(one, FaceteerError) else to_array(one.embedding.embeds) for one in results]
        if results:
            return np.stack([to_array(one.embedding.embeds) for one in results])
        return np.empty((0, (await self._connection.facts(attempts)).sae.d_in), np.float32)

    async def _sae_batches(
        self, method: Method[Any], items: Sequence[Any], build: Any, on_error: OnItemError, attempts: Attempts
    ) -> list[Any]:
        if not items:
            return []
        limit = min((await self._connection.facts(attempts)).sae.max_batch or _MOST_ITEMS, _MOST_ITEMS)
        keep = on_error == "return"
        return await self._connection.call_in_batches(method, items, build, limit, attempts, keep_errors=keep)


def _check_on_error(on_error: str) -> None:
    if on_error not in ("raise", "return"):
        raise invalid("on_error", f"{on_error!r} is unknown; pass raise or return")
