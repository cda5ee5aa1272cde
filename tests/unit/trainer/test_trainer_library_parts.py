"""The parts of a library's build, each against a plain computation, with more than fits into any of their blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.rows import Rows
from faceteer_sae.weights import SaeWeights, write_weights
from faceteer_trainer.errors import JobError
from faceteer_trainer.library.activations import ActivationStore
from faceteer_trainer.library.encoding import Active, BulkEncoder
from faceteer_trainer.library.related import coactivating_common, coactivating_sampled, nearest
from faceteer_trainer.library.tallies import Pairs, Spread, Table, lottery
from faceteer_trainer.library.writing import from_quantiles, strongest
from tiny_corpus import D


def sparse_of(dense: np.ndarray) -> Active:
    rows, columns = np.nonzero(dense)
    indptr = np.concatenate([[0], np.cumsum((dense > 0).sum(1))]).astype(np.int64)
    return Active(indptr, columns.astype(np.int32), dense[rows, columns].astype(np.float32))


def random_acts(rows: int = 400, features: int = 20, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    acts = rng.lognormal(0, 1.5, (rows, features)) * (rng.random((rows, features)) < np.linspace(0.002, 0.6, features))
    return acts.astype(np.float32)


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk", "jumprelu"])
def test_encoding_in_bulk_finds_the_services_own_features(architecture: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    d_sae, k = 600, 12
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, D, generator=generator), dim=1)
    b_enc, b_dec = torch.randn(d_sae, generator=generator) - 2, torch.randn(D, generator=generator)
    thresholds = {"batchtopk": torch.tensor(2.5), "jumprelu": 3 * torch.rand(d_sae, generator=generator)}
    k = k if "topk" in architecture else 0
    weights = SaeWeights(architecture, W_dec * 1.3, b_enc, W_dec, b_dec, True, k, thresholds.get(architecture))
    write_weights(tmp_path, weights, "float16")
    sae = SparseAutoencoder.load(tmp_path)
    x = 4 * torch.randn(300, D, generator=generator).numpy()
    found = BulkEncoder(sae, batch=64).encode(x)
    for row, expected in enumerate(sae.encode(x)):
        part = slice(found.indptr[row], found.indptr[row + 1])
        assert found.indices[part].tolist() == expected.top_indices.tolist()
        assert np.allclose(found.values[part], expected.top_acts, rtol=1e-5)


def test_counts_means_and_maxima_are_exact_and_quantiles_within_one_percent() -> None:
    acts = random_acts(3000, 24)
    spread = Spread(24, float(acts.max()))
    for start in (0, 1000, 2500):
        spread.add(sparse_of(acts[start : {0: 1000, 1000: 2500, 2500: 3000}[start]]))
    for feature in range(24):
        positive = acts[:, feature][acts[:, feature] > 0]
        assert spread.count[feature] == len(positive)
        assert spread.max[feature] == positive.max(initial=0)
        if len(positive):
            assert spread.mean()[feature] == pytest.approx(positive.mean(), rel=1e-5)
            for q in (0.01, 0.5, 0.99):
                exact = np.quantile(positive, q, method="lower")
                assert spread.quantile(q)[feature] == pytest.approx(exact, rel=0.0101)
            edges, counts = spread.histogram(feature, 8)
            assert edges[-1] == pytest.approx(positive.max())
            assert counts.sum() == len(positive)
            exact_counts = np.histogram(positive, 8, (0, positive.max()))[0]
            assert np.abs(np.cumsum(counts) - np.cumsum(exact_counts)).max() <= max(2, 0.03 * len(positive))


def test_a_table_keeps_each_features_strongest_whatever_the_blocks() -> None:
    acts = random_acts(500, 12, seed=1)
    small, large = Table(12, 7, buffer=50), Table(12, 7)
    for start in range(0, 500, 100):
        active = sparse_of(acts[start : start + 100])
        for table in (small, large):
            table.add(active.indices, active.rows + start, active.values, active.values)
    for feature in range(12):
        order = np.argsort(-acts[:, feature], kind="stable")[:7]
        expected = [int(row) for row in order if acts[row, feature] > 0]
        assert small.entries().of(feature).rows.tolist() == expected
        assert large.entries().of(feature).rows.tolist() == expected


def test_a_sample_is_uniform_and_the_same_in_any_order() -> None:
    features, rows = np.zeros(5000, np.int32), np.arange(5000, dtype=np.int64)
    tickets = lottery(features, rows, 0)
    assert len(np.unique(tickets)) > 4950
    assert 0.0 < tickets.min() < tickets.max() <= 1.0
    assert abs(np.corrcoef(tickets, rows)[0, 1]) < 0.05
    chosen = np.argsort(-tickets)[:500]
    assert 2200 < rows[chosen].mean() < 2800
    assert not np.array_equal(tickets, lottery(features, rows, 1))
    assert not np.array_equal(tickets, lottery(features + 1, rows, 0))
    shuffled = np.random.default_rng(0).permutation(5000)
    assert np.array_equal(lottery(features, rows[shuffled], 0), tickets[shuffled])


def test_pairs_are_counted_exactly() -> None:
    acts = random_acts(300, 10, seed=2)
    pairs = Pairs(np.array([2, 5, 9]), 10)
    pairs.add(sparse_of(acts[:120]))
    pairs.add(sparse_of(acts[120:]))
    fires = (acts[:, [2, 5, 9]] > 0).astype(int)
    assert pairs.together.tolist() == (fires.T @ fires).tolist()
    strong = Pairs(np.array([2, 5, 9]), 10)
    active = sparse_of(acts)
    strong.add(active, active.values > 1.5)
    loud = (acts[:, [2, 5, 9]] > 1.5).astype(int)
    assert strong.together.tolist() == (loud.T @ loud).tolist()


def test_lift_is_what_is_done_by_hand() -> None:
    # 100 pictures; 0 and 1 fire on 20 each, ten times together: P(both) / (P(0) P(1)) = 0.1 / 0.04.
    acts = np.zeros((100, 3), np.float32)
    acts[:20, 0] = acts[10:30, 1] = acts[:, 2] = 1.0
    pairs = Pairs(np.arange(3), 3)
    pairs.add(sparse_of(acts))
    found = coactivating_common(pairs, (acts > 0).sum(0), 100, 5)
    assert found[0] == [(1, pytest.approx(2.5))]
    assert found[2] == []


def test_nearest_directions_are_those_of_a_plain_computation() -> None:
    # Wanted ones beyond the 4,096 that are read at a time, and beyond the 512 that are compared at a time.
    rows = torch.randn(6300, 16, generator=torch.Generator().manual_seed(5))
    wanted = np.flatnonzero(np.arange(6300) % 3 > 0)
    unit = torch.nn.functional.normalize(rows, dim=1).numpy()[wanted]
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    found = nearest(Rows(rows), 4, wanted)
    for place, feature in enumerate(wanted):
        best = np.argsort(-cosines[place])[:4]
        assert [other for other, _ in found[int(feature)]] == wanted[best].tolist()
        assert np.allclose([score for _, score in found[int(feature)]], cosines[place][best], atol=1e-6)


def test_near_identical_pictures_are_shown_once() -> None:
    vectors = np.eye(5, dtype=np.float32)
    vectors[2] = vectors[0] + 0.01
    chosen = strongest(np.arange(5), np.linspace(5, 1, 5).astype(np.float32), vectors, 3)
    assert [example.row for example in chosen] == [0, 1, 3]
    assert [example.rank for example in chosen] == [0, 1, 2]


def test_every_quantile_gives_its_pictures_and_none_twice() -> None:
    ranks = np.array([0.1, 0.3, 0.6, 0.8, 0.99, 0.05], np.float32)
    values = np.array([1, 3, 6, 8, 10, 0.5], np.float32)
    chosen = from_quantiles(np.arange(6), values, ranks, 1, {3})
    assert [(example.row, example.quantiles) for example in chosen] == [
        (4, (0.75, 1.0)), (2, (0.5, 0.75)), (1, (0.25, 0.5)), (0, (0.0, 0.25)),
    ]  # fmt: skip


def test_activations_come_back_as_they_were_written(tmp_path: Path) -> None:
    acts = random_acts(50, 9, seed=4)
    store = ActivationStore(tmp_path / "a", {"corpus": "c"})
    store.write(0, sparse_of(acts[:30]))
    store.write(30, sparse_of(acts[30:]))
    wanted = np.array([3, 29, 30, 49])
    found = store.rows(wanted)
    for place, row in enumerate(wanted):
        part = slice(found.indptr[place], found.indptr[place + 1])
        assert found.indices[part].tolist() == np.flatnonzero(acts[row]).tolist()
    with pytest.raises(JobError, match=r"another corpus \(c, now d\) is in the way"):
        ActivationStore(tmp_path / "a", {"corpus": "d"})


def test_quantiles_and_ranks_are_each_features_own_beyond_one_block() -> None:
    # Features beyond the 4,096, values beyond the 65,536 that are looked at together. A feature fires with 1, 2 and 4
    # times its own scale, on 9, 9 and 2 pictures.
    d_sae = 5000
    scale = np.linspace(1, 50, d_sae).astype(np.float32)
    acts = Active(
        np.arange(0, 20 * d_sae + 1, d_sae),
        np.tile(np.arange(d_sae, dtype=np.int32), 20),
        np.concatenate([scale * (1, 2, 4)[min(row // 9, 2)] for row in range(20)]),
    )
    spread = Spread(d_sae, float(acts.values.max()))
    spread.add(acts)
    assert np.allclose(spread.quantile(0.4), scale, rtol=0.0101)
    assert np.allclose(spread.quantile(0.5), 2 * scale, rtol=0.0101)
    assert np.allclose(spread.quantile(1.0), 4 * scale, rtol=0.0101)
    # Below: those before it, and half of its own bin.
    ranks = spread.rank(acts.indices, acts.values).reshape(20, d_sae)
    for row, expected in ((0, 4.5 / 20), (8, 4.5 / 20), (9, 13.5 / 20), (19, 19 / 20)):
        assert np.allclose(ranks[row], expected), row


def test_a_feature_that_never_fires_has_neither_quantiles_nor_a_mean() -> None:
    spread = Spread(2, 4.0)
    spread.add(Active(np.array([0, 1]), np.array([1], np.int32), np.array([3.0], np.float32)))
    assert spread.quantile(0.99).tolist() == [0, 3.0]
    assert spread.mean().tolist() == [0, 3.0]


def test_partners_are_named_from_five_pictures_and_a_fifth_more_than_chance() -> None:
    # 100 pictures; feature 0 fires on 20 of them. With it: 1 on five of its 20 (lift 1.25), 2 on four of its 4,
    # 3 on six of its 25 (lift 1.2).
    acts = np.zeros((100, 4), np.float32)
    acts[:20, 0] = acts[15:35, 1] = acts[:4, 2] = acts[14:39, 3] = 1.0
    pairs = Pairs(np.arange(4), 4)
    pairs.add(sparse_of(acts))
    count = (acts > 0).sum(0)
    assert coactivating_common(pairs, count, 100, 5)[0] == [(1, pytest.approx(1.25))]
    assert coactivating_sampled(sparse_of(acts[:20]), count, 100, 5, 0) == [(1, pytest.approx(1.25))]
    # Of a sample smaller than that, what is there in every picture counts.
    assert coactivating_sampled(sparse_of(acts[:3]), count, 100, 5, 0) == [(2, pytest.approx(25.0))]
