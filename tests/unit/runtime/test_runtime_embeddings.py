"""Embeddings by id, as the services share them through the cache."""

from __future__ import annotations

import numpy as np
import pytest
from faceteer.v1 import tensor_pb2
from faceteer_runtime.cache import Cache
from faceteer_runtime.cache_keys import embeds_content_id, embeds_key
from faceteer_runtime.embeddings import Embedding, EmbeddingStore, Source
from faceteer_runtime.errors import EmbeddingExpired, InvalidField, RevisionMismatch
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.outcome import Failed
from faceteer_runtime.tensors import to_embeds, to_tensor

ENCODER = "0123456789abcdef"
X = np.arange(4, dtype=np.float32)


@pytest.fixture
def cache() -> Cache:
    return Cache(1 << 20, Metrics())


async def test_an_embedding_that_is_brought_can_be_named_afterwards(cache: Cache) -> None:
    store = EmbeddingStore(cache, ENCODER, 4)
    kept = await store.resolve(X)
    assert kept.embedding_id == embeds_content_id(ENCODER, X)
    again = await store.resolve(kept.embedding_id)
    assert again.embedding_id == kept.embedding_id
    assert again.x.tolist() == X.tolist()


async def test_an_unknown_id_has_expired_and_a_long_one_is_cut_in_the_error(cache: Cache) -> None:
    for name, told in (("x" * 129, "x" * 129), ("x" * 130, "x" * 128 + "…")):
        with pytest.raises(EmbeddingExpired) as expired:
            await EmbeddingStore(cache, ENCODER, 4).resolve(name)
        assert expired.value.metadata["embedding_id"] == told


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"embeds": b"bytes"},
        {"embeds": X.astype(float)},
        {"embeds": X[None]},
        {"embeds": X[:3]},
        {"embeds": np.float32([0, np.inf, 2, 3])},
    ],
    ids=["nothing", "bytes", "float64", "two dimensions", "another length", "not finite"],
)
async def test_a_record_of_another_form_counts_as_expired(cache: Cache, record: dict) -> None:
    name = embeds_content_id(ENCODER, X)
    cache.put(embeds_key(name), record)
    with pytest.raises(EmbeddingExpired):
        await EmbeddingStore(cache, ENCODER, 4).resolve(name)


async def test_another_encoders_embedding_is_refused(cache: Cache) -> None:
    name = embeds_content_id("feedfeedfeedfeed", X)
    cache.put(embeds_key(name), {"embeds": X})
    with pytest.raises(RevisionMismatch) as refused:
        await EmbeddingStore(cache, ENCODER, 4).resolve(name)
    assert refused.value.metadata == {"part": "encoder", "expected": "feedfeedfeedfeed", "actual": ENCODER}


async def test_of_many_each_has_its_own_fate(cache: Cache) -> None:
    store = EmbeddingStore(cache, ENCODER, 4)
    known = store.keep(X + 1)
    failed = Failed(ValueError())
    sources: list[Source | Failed] = [X, "gone", known.embedding_id, failed]
    (brought, gone, named, left), _ = await store.resolve_many(sources)
    assert isinstance(brought, Embedding)
    assert isinstance(gone, Failed)
    assert isinstance(gone.error, EmbeddingExpired)
    assert isinstance(named, Embedding)
    assert named.x.tolist() == (X + 1).tolist()
    assert left is failed


def test_a_request_names_an_embedding_or_brings_one() -> None:
    source = tensor_pb2.EmbedsInput(embedding_id="name")
    assert to_embeds(source, field="input", dim=4) == "name"
    brought = to_embeds(tensor_pb2.EmbedsInput(embeds=to_tensor(X)), field="input", dim=4)
    assert isinstance(brought, np.ndarray)
    assert brought.tolist() == X.tolist()
    with pytest.raises(InvalidField) as refused:
        to_embeds(tensor_pb2.EmbedsInput(embeds=to_tensor(X)), field="input", dim=5)
    assert refused.value.field == "input.embeds.shape"
    with pytest.raises(InvalidField) as refused:
        to_embeds(tensor_pb2.EmbedsInput(), field="source", dim=4)
    assert refused.value.field == "source"
