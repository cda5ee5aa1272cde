"""What the service decides: when all features are found, what is kept, and where work runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from faceteer_runtime.batching import ModelWorker
from faceteer_runtime.cache import Cache
from faceteer_runtime.cache_keys import FEATURES, cache_key
from faceteer_runtime.errors import Draining, InvalidField
from faceteer_runtime.metrics import Metrics
from faceteer_runtime.outcome import Failed, required
from faceteer_sae.application import Decoding, SaeApplication
from faceteer_sae.edits import EditColumns
from faceteer_sae.features import Encoding, Origin, from_record, to_record
from faceteer_sae.model import FeatureActivations, SparseAutoencoder
from faceteer_sae.settings import SaeSettings
from unit.sae.random_sae import embeddings, random_sae

ENCODER = "0123456789abcdef"
(X, Y) = embeddings(1, 2)
NONE = EditColumns(np.empty(0, int), np.empty(0, int), np.empty(0), np.empty(0, int))
# SET feature 3 to 2 and ABLATE feature 5, in RAW units.
TWO = EditColumns(np.array([3, 5]), np.array([1, 4]), np.array([2.0, 0.0]), np.array([2, 2]))


class Counting:
    """An application, and the passes that its model made."""

    def __init__(self, sae: SparseAutoencoder, worker: ModelWorker, **settings: Any) -> None:
        self.sae, self.passes = sae, 0
        self.cache = Cache(1 << 22, Metrics())
        encode = sae.encode

        def counted(x: np.ndarray) -> list[FeatureActivations]:
            self.passes += len(x)
            return encode(x)

        sae.encode = counted  # type: ignore[method-assign]
        self.application = SaeApplication(
            sae,
            None,
            revision="rev",
            encoder_revision=ENCODER,
            cache=self.cache,
            worker=worker,
            metrics=Metrics(),
            settings=SaeSettings(**settings),
            origin=Origin("tiny"),
        )


@pytest.fixture
def counting() -> Iterator[Callable[..., Counting]]:
    worker = ModelWorker("sae-test")
    yield lambda architecture="standard", **options: Counting(
        random_sae(architecture, seed=3, **options).sae, worker, sae_max_edits=3
    )
    worker.close()


@pytest.mark.parametrize("architecture", ["standard", "batchtopk", "jumprelu"])
async def test_an_edit_makes_no_pass_where_each_feature_stands_for_itself(
    counting: Callable[..., Counting], architecture: str
) -> None:
    one = counting(architecture)
    result, cost = await one.application.edit(X, TWO)
    assert (one.passes, cost.cached, result.measured) == (0, True, None)


async def test_an_edit_of_topk_makes_one_pass_unless_the_features_are_known(counting: Callable[..., Counting]) -> None:
    one = counting("topk")
    result, cost = await one.application.edit(X, TWO)
    assert (one.passes, cost.cached) == (1, False)
    assert cost.compute_us > 0
    again, cost = await one.application.edit(X, TWO)
    assert (one.passes, cost.cached, cost.compute_us) == (1, True, 0)
    assert again.activations["before"].tolist() == result.activations["before"].tolist()


@pytest.mark.parametrize("architecture", ["standard", "topk"])
async def test_measuring_makes_a_pass_before_and_one_after(
    counting: Callable[..., Counting], architecture: str
) -> None:
    one = counting(architecture)
    result, cost = await one.application.edit(X, TWO, measure=True)
    assert (one.passes, cost.cached) == (2, False)
    assert result.measured is not None
    (after,) = one.sae.encode(result.embedding.x[None])
    assert result.measured.achieved.tolist() == after.at(TWO.indices).tolist()
    # Both embeddings' features are known from now on.
    one.passes = 0
    _, cost = await one.application.edit(X, TWO, measure=True)
    assert (one.passes, cost.cached) == (0, True)


async def test_eight_drifted_features_are_reported_unless_another_number_is_asked_for(
    counting: Callable[..., Counting],
) -> None:
    one = counting("standard")
    for asked, most in ((0, 8), (2, 2), (1000, 1000)):
        result, _ = await one.application.edit(X, TWO, measure=True, max_drifted=asked)
        assert result.measured is not None
        (before, after) = (one.sae.encode(x[None])[0].at(np.arange(96)) for x in (X, result.embedding.x))
        moved = [i for i in np.flatnonzero(before != after) if i not in (3, 5)]
        assert len(moved) > 8
        assert len(result.measured.drifted) == min(most, len(moved))
    with pytest.raises(InvalidField) as refused:
        await one.application.edit(X, TWO, max_drifted=1001)
    assert refused.value.field == "max_drifted"


async def test_what_goes_in_and_what_comes_out_can_be_named_afterwards(counting: Callable[..., Counting]) -> None:
    one = counting("standard")
    result, _ = await one.application.edit(X, TWO)
    same, _ = await one.application.edit(result.embedding.embedding_id, NONE)
    assert same.embedding.embedding_id == result.embedding.embedding_id
    assert same.embedding.x.tolist() == result.embedding.x.tolist()
    (encoded, failed), _ = await one.application.encode([X, Failed(ValueError())])
    assert required(encoded).embedding.x.tolist() == X.tolist()
    assert isinstance(failed, Failed)
    ((decoded,), _) = await one.application.decode([Decoding(np.array([1]), np.float32([2]), None)])
    (known,), _ = await one.application.encode([required(decoded).embedding_id])
    assert required(known).embedding.x.tolist() == one.sae.decode(np.array([1]), np.float32([2])).tolist()


async def test_an_error_is_given_only_when_asked_for_and_limits_only_what_is_shown(
    counting: Callable[..., Counting],
) -> None:
    one = counting("standard")
    (plain, full), _ = await one.application.encode([X, Y], max_features=3)
    assert required(plain).error is None
    assert [len(required(one).features.indices) for one in (plain, full)] == [3, 3]
    assert required(plain).encoding.l0 == len(one.sae.encode(X[None])[0].top_indices) > 3
    (with_error,), _ = await one.application.encode([X], include_error=True)
    features = required(with_error).encoding.features
    np.testing.assert_allclose(
        required(with_error).error + one.sae.decode(features.top_indices, features.top_acts), X, atol=1e-4
    )
    assert len(required(with_error).features.indices) == required(with_error).encoding.l0


@pytest.mark.parametrize(("rows", "on_the_loop"), [(2048, True), (2049, False)])
async def test_many_rows_are_combined_on_the_models_thread_and_few_on_the_loop(
    counting: Callable[..., Counting], rows: int, on_the_loop: bool
) -> None:
    one = counting("standard", d_in=4, d_sae=3000)
    threads = []
    decode = one.sae.decode

    def noted(*arguments: Any) -> np.ndarray:
        threads.append(threading.current_thread() is threading.main_thread())
        return decode(*arguments)

    one.sae.decode = noted  # type: ignore[method-assign]
    await one.application.decode([Decoding(np.arange(rows), np.zeros(rows, np.float32), None)])
    assert threads == [on_the_loop]


async def test_a_decoded_embedding_out_of_all_bounds_fails_alone_and_by_its_field(
    counting: Callable[..., Counting],
) -> None:
    one = counting("standard")
    items = [Decoding(np.array([1]), np.float32([v]), None) for v in (1.0, 1e9)]
    (good, bad), cost = await one.application.decode([*items])
    assert not isinstance(good, Failed)
    assert isinstance(bad, Failed)
    assert isinstance(bad.error, InvalidField)
    assert bad.error.field == "items[1].features.activations"
    assert cost.compute_us > 0


async def test_a_diff_knows_its_limits_and_defaults(counting: Callable[..., Counting]) -> None:
    one = counting("standard")
    found, cost = await one.application.diff(X, Y, coverage=1.0)
    assert len(found.indices) <= 3
    assert (one.passes, cost.cached) == (2, False)
    assert len((await one.application.diff(X, Y, coverage=1.0, max_edits=1))[0].indices) == 1
    assert (await one.application.diff(X, X))[0].coverage == 1.0
    with pytest.raises(InvalidField) as refused:
        await one.application.diff(X, Y, max_edits=4)
    assert refused.value.field == "max_edits"
    await one.application.diff(X, Y, max_edits=3)


async def test_a_closed_service_computes_nothing_more(counting: Callable[..., Counting]) -> None:
    one = counting("topk")
    one.application.close()
    with pytest.raises(Draining):
        await one.application.encode([X])
    with pytest.raises(Draining):
        await one.application.edit(X, TWO)


def kept(indices: list[int], kth: float = 0.5) -> Encoding:
    acts = np.arange(1, len(indices) + 1, dtype=np.float32)
    return Encoding(FeatureActivations(np.array(indices, np.int32), acts, kth), len(indices), 0.25, 0.75, 40.0, 0.5)


def test_an_encoding_comes_out_of_the_cache_as_it_went_in() -> None:
    for encoding in (kept([0, 7, 95]), kept([])):
        again = from_record(to_record(encoding), 96)
        assert again is not None
        assert again[1:] == encoding[1:]
        assert again.features.kth_pre_act == 0.5
        assert again.features.top_indices.tolist() == encoding.features.top_indices.tolist()
        assert again.features.top_acts.tolist() == encoding.features.top_acts.tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"indices": np.array([0, 96], np.int32)},
        {"indices": np.array([-1, 3], np.int32)},
        {"indices": np.array([0, 3], np.int64)},
        {"indices": np.array([3], np.int32)},
        {"activations": np.array([1, 2], np.float64)},
        {"activations": np.array([1, 2], np.float16)},
        {"summary": np.zeros(3)},
        {"summary": b"bytes"},
    ],
    ids=str,
)
async def test_a_record_that_is_no_encoding_of_this_sae_is_computed_anew(
    counting: Callable[..., Counting], changes: dict[str, Any]
) -> None:
    record = to_record(kept([0, 3]))
    assert from_record(record | {"indices": np.array([0, 95], np.int32)}, 96) is not None
    assert from_record(record | changes, 96) is None
    one = counting("standard")
    one.cache.put(cache_key(FEATURES, "rev", X.tobytes()), record | changes)
    await one.application.encode([X])
    assert one.passes == 1
