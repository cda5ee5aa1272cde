"""The smallest set of edits that carries a share of a difference, against brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from faceteer_runtime.errors import InvalidField
from faceteer_sae.diff import FeatureDiff, check_coverage, diff_features, for_another
from faceteer_sae.edits import Operation
from faceteer_sae.model import FeatureActivations, SparseAutoencoder
from faceteer_sae.statistics import FeatureStatistics
from faceteer_sae.weights import SaeConfig
from unit.sae.random_sae import Pair, embeddings, random_sae


def diff(pair: Pair, source: np.ndarray, target: np.ndarray, coverage: float, max_edits: int = 1000) -> FeatureDiff:
    f_source, f_target = pair.sae.encode(np.stack([source, target]))
    return diff_features(pair.sae, source, target, f_source, f_target, coverage, max_edits)


def carried(pair: Pair, source: np.ndarray, target: np.ndarray, chosen: list[int]) -> float:
    """The contract's carried share, in float64 over all features."""
    g = pair.dense.encode(target.astype(float)) - pair.dense.encode(source.astype(float))
    rest = g.copy()
    rest[chosen] = 0
    D, r = g @ pair.dense.W_dec, rest @ pair.dense.W_dec
    return float(1 - r @ r / (D @ D))


@pytest.mark.parametrize("seed", range(12))
def test_hardly_more_edits_than_the_fewest_that_brute_force_finds(seed: int) -> None:
    pair = random_sae("topk", seed=seed, d_sae=40, k=5)
    source, target = embeddings(seed + 100, 2)
    g = pair.dense.encode(target.astype(float)) - pair.dense.encode(source.astype(float))
    differing = np.flatnonzero(g).tolist()
    for coverage in (0.5, 0.8, 0.95):
        found = diff(pair, source, target, coverage)
        fewest = next(
            size
            for size in range(1, len(differing) + 1)
            if any(carried(pair, source, target, list(chosen)) >= coverage for chosen in combinations(differing, size))
        )
        assert fewest <= len(found.indices) <= fewest + 1
        assert found.coverage >= coverage
        assert np.isclose(found.coverage, carried(pair, source, target, found.indices.tolist()), atol=1e-5)


def test_with_orthogonal_features_the_set_is_the_smallest() -> None:
    eye, nothing = torch.eye(12), torch.zeros(12)
    weights = {"W_enc": eye, "b_enc": nothing, "W_dec": eye, "b_dec": nothing}
    sae = SparseAutoencoder(SaeConfig("standard", 12, 12, 0, False, {}), weights)
    source, target = np.zeros(12, np.float32), np.arange(12, dtype=np.float32)
    found = diff_features(sae, source, target, *sae.encode(np.stack([source, target])), 0.7)
    # The squares of 11, 10 and 9 are 302 of 506, 60 %; with the 64 of 8 they are 72 %.
    assert found.indices.tolist() == found.values.tolist() == [11, 10, 9, 8]
    assert found.coverage == pytest.approx(366 / 506)
    assert found.differing == 11
    assert found.unexplained == pytest.approx(0)


def test_the_edits_are_the_differences_of_the_activations_largest_contribution_first(pair: Pair) -> None:
    source, target = embeddings(6, 2)
    found = diff(pair, source, target, 0.95)
    g = pair.dense.encode(target.astype(float)) - pair.dense.encode(source.astype(float))
    assert found.differing == np.count_nonzero(g)
    assert np.allclose(found.values, g[found.indices], rtol=1e-4, atol=1e-4)
    contributions = g[found.indices] * (pair.dense.W_dec[found.indices] @ (g @ pair.dense.W_dec))
    assert (np.diff(contributions) <= 1e-3 * np.abs(contributions).max()).all()


def test_all_edits_and_the_unexplained_rest_lead_from_source_to_target(pair: Pair) -> None:
    source, target = embeddings(7, 2)
    found = diff(pair, source, target, 1.0)
    moved = source + pair.sae.combine(found.indices, found.values)
    rest, whole = target - moved, target - source
    assert np.isclose(found.unexplained, (rest @ rest) / (whole @ whole), rtol=1e-3, atol=1e-5)


def test_a_limit_on_edits_carries_what_it_can(pair: Pair) -> None:
    source, target = embeddings(8, 2)
    found = diff(pair, source, target, 1.0, max_edits=2)
    assert len(found.indices) <= 2
    assert 0 < found.coverage < 1


def test_the_same_embedding_twice_differs_in_nothing(pair: Pair) -> None:
    (x,) = embeddings(9, 1)
    found = diff(pair, x, x, 0.9)
    assert (len(found.indices), found.coverage, found.differing, found.unexplained) == (0, 1.0, 0, 0.0)


def test_features_whose_changes_cancel_to_nothing_need_no_edits() -> None:
    pair = random_sae("standard", d_sae=3, d_in=2)
    pair.sae._W_dec.values[:] = 0
    pair.sae._W_dec.values[0, 0], pair.sae._W_dec.values[1, 0] = 1.0, -1.0
    none = FeatureActivations(np.empty(0, np.int32), np.empty(0, np.float32), np.nan)
    both = FeatureActivations(np.array([0, 1], np.int32), np.ones(2, np.float32), np.nan)
    x = np.zeros(2, np.float32)
    found = diff_features(pair.sae, x, x + 1, none, both, 0.9)
    assert [len(each) for each in (found.indices, found.operations, found.values, found.shares)] == [0, 0, 0, 0]
    assert (found.coverage, found.differing, found.unexplained) == (1.0, 2, 1.0)


def test_features_that_cancel_each_other_do_not_stop_the_search() -> None:
    pair = random_sae("standard", d_sae=3, d_in=2)
    pair.sae._W_dec.values[:] = 0
    pair.sae._W_dec.values[0, 0], pair.sae._W_dec.values[0, 1] = 10.0, 1.0
    pair.sae._W_dec.values[1, 0], pair.sae._W_dec.values[1, 1] = -10.0, 1.0
    none = FeatureActivations(np.empty(0, np.int32), np.empty(0, np.float32), np.nan)
    both = FeatureActivations(np.array([0, 1], np.int32), np.ones(2, np.float32), np.nan)
    x = np.zeros(2, np.float32)
    found = diff_features(pair.sae, x, x + np.float32([0, 2]), none, both, 0.9)
    assert sorted(found.indices.tolist()) == [0, 1]
    assert found.coverage == 1.0


@pytest.mark.parametrize("coverage", [-0.5, 1.01, float("nan")])
def test_coverage_outside_its_range_is_refused(coverage: float) -> None:
    with pytest.raises(InvalidField) as refused:
        check_coverage(coverage)
    assert refused.value.field == "coverage"


def test_a_coverage_of_one_may_be_asked_for_and_none_means_the_default() -> None:
    assert (check_coverage(1.0), check_coverage(0.0)) == (1.0, 0.9)


def test_thousands_of_differing_features_are_no_obstacle() -> None:
    pair = random_sae("standard", d_in=16, d_sae=9000)
    source, target = embeddings(3, 2, 16)
    found = diff(pair, source, target, 0.5)
    assert found.differing > 2048
    assert np.isclose(found.coverage, carried(pair, source, target, found.indices.tolist()), atol=1e-4)
    assert found.coverage >= 0.5


# -- as edits of another picture -------------------------------------------------------------------------

# Day, dusk and night are rivals of each other; 3 and 4 have none.
RIVALS = {0: [1, 2], 1: [0, 2], 2: [0, 1], 3: [], 4: [], 5: []}
STATISTICS = FeatureStatistics(
    firing_share=np.full(6, 0.3, np.float32),
    p99=np.ones(6, np.float32),
    rivals_offsets=np.cumsum([0, *map(len, RIVALS.values())]),
    rivals_indices=np.array([rival for rivals in RIVALS.values() for rival in rivals], np.int32),
)


def carried_over(source: dict[int, float], target: dict[int, float]) -> FeatureDiff:
    eye, nothing = torch.eye(6), torch.zeros(6)
    weights = {"W_enc": eye, "b_enc": nothing, "W_dec": eye, "b_dec": nothing}
    sae = SparseAutoencoder(SaeConfig("standard", 6, 6, 0, False, {}), weights)
    a, b = (np.array([f.get(i, 0.0) for i in range(6)], np.float32) for f in (source, target))
    f_a, f_b = sae.encode(np.stack([a, b]))
    return for_another(diff_features(sae, a, b, f_a, f_b, 1.0), f_a, f_b, STATISTICS)


def as_written(found: FeatureDiff) -> list[tuple[int, str, float]]:
    columns = (found.indices.tolist(), found.operations.tolist(), found.values.tolist())
    return [(i, Operation(o).name, pytest.approx(v)) for i, o, v in zip(*columns, strict=True)]


def test_what_is_turned_on_and_has_rivals_is_switched_to_and_what_gives_way_to_it_is_left_to_it() -> None:
    found = carried_over({0: 0.8, 3: 0.5}, {2: 0.9, 3: 0.7})
    assert as_written(found) == [(2, "SWITCH", 0.9), (3, "ADD", 0.2)]
    # Day going is night's share too.
    assert found.shares.tolist() == pytest.approx([1.45 / 1.49, 0.04 / 1.49])


def test_what_is_turned_off_with_nothing_in_its_place_is_ablated() -> None:
    assert as_written(carried_over({0: 0.8, 3: 0.9}, {})) == [(3, "ABLATE", 0), (0, "ABLATE", 0)]


def test_a_flicker_and_a_change_of_degree_are_added() -> None:
    assert as_written(carried_over({0: 0.8, 1: 0.05}, {0: 1.0, 1: 0.2})) == [(0, "ADD", 0.2), (1, "ADD", 0.15)]


def test_a_rival_that_grows_too_is_not_left_to_the_switch() -> None:
    assert as_written(carried_over({1: 0.05}, {1: 0.2, 2: 0.9})) == [(2, "SWITCH", 0.9), (1, "ADD", 0.15)]


def test_without_statistics_everything_is_added() -> None:
    pair = random_sae("topk", seed=1, d_sae=40, k=5)
    source, target = embeddings(5, 2)
    f_source, f_target = pair.sae.encode(np.stack([source, target]))
    plain = diff_features(pair.sae, source, target, f_source, f_target, 1.0)
    assert for_another(plain, f_source, f_target, None) is plain
    assert set(plain.operations.tolist()) == {Operation.ADD}
    assert plain.shares.sum() == pytest.approx(1, abs=1e-3)
