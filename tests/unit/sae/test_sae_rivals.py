"""The rule for rivals, and how well reconstructions match: numbers that one can do by hand."""

from __future__ import annotations

import numpy as np
import pytest
from faceteer_sae.features import explained_variance
from faceteer_sae.reconstruction import Reconstruction
from faceteer_sae.rivals import RivalRule, Rivals, find_rivals

# 1,000 pictures; features 3 and 7 of ten were counted.
FEATURES = np.array([3, 7])


def rivals_of(count_a: int, count_b: int, both: int, pictures: int = 1000, rule: RivalRule | None = None) -> bool:
    strong_count = np.zeros(10, np.int64)
    strong_count[FEATURES] = count_a, count_b
    together = np.array([[count_a, both], [both, count_b]])
    found = find_rivals(FEATURES, together, strong_count, pictures, rule or RivalRule())
    assert found.offsets.shape == (11,)
    assert found.offsets[-1] in (0, 2)  # rivalry is mutual
    return bool(found.offsets[-1])


def test_features_that_meet_less_than_a_tenth_as_often_as_chance_has_it_are_rivals() -> None:
    # 400 and 500 of 1,000: independence predicts 200 pictures with both, a tenth of which are 20.
    assert rivals_of(400, 500, 0)
    assert rivals_of(400, 500, 19)
    assert not rivals_of(400, 500, 20)
    assert rivals_of(400, 500, 99, rule=RivalRule(most_ratio=0.5))


def test_too_few_pictures_say_nothing_about_rivalry() -> None:
    # 100 and 200 of 1,000: 20 are predicted, just enough.
    assert rivals_of(100, 200, 1)
    assert not rivals_of(100, 199, 0)
    # Both must fire on a hundredth of the pictures.
    assert rivals_of(100, 9000, 0, pictures=10_000)
    assert not rivals_of(99, 9000, 0, pictures=10_000)
    assert not rivals_of(9000, 99, 0, pictures=10_000)


def test_rows_are_compressed_by_feature_with_what_was_seen_over_what_was_expected() -> None:
    # 1 and 4 never meet; 4 and 6 meet 5 times where 100 are expected; 1 and 6 as chance has it.
    strong_count = np.array([0, 200, 0, 0, 500, 0, 200, 0])
    together = np.array([[200, 0, 40], [0, 500, 5], [40, 5, 200]])
    found = find_rivals(np.array([1, 4, 6]), together, strong_count, 1000)
    assert found.offsets.tolist() == [0, 0, 1, 1, 1, 3, 3, 4, 4]
    assert found.indices.tolist() == [4, 1, 6, 4]
    assert found.lifts.tolist() == pytest.approx([0, 0, 0.05, 0.05])
    assert found.indices.dtype == np.int32


def test_the_best_rivals_are_those_met_least_and_of_equal_ones_the_commonest() -> None:
    lifts = np.array([0.05, 0.0, 0.0, 0.01], np.float32)
    found = Rivals(np.array([0, 4]), np.array([1, 2, 3, 4], np.int32), lifts, np.array([0, 9, 20, 30, 9]))
    assert [feature for feature, _ in found.best(0, 3)] == [3, 2, 4]
    assert found.best(0, 4)[3] == (1, pytest.approx(0.05))


def test_no_features_have_no_rivals() -> None:
    none = np.empty(0, np.int64)
    found = find_rivals(none, np.empty((0, 0), np.int64), np.zeros(3, np.int64), 100)
    assert found.offsets.tolist() == [0, 0, 0, 0]
    assert len(found.indices) == 0


def test_a_reconstructions_figures_are_those_done_by_hand_in_one_block_or_several() -> None:
    x = np.array([[0, 0], [2, 0], [0, 4], [2, 4]], np.float32)
    half = x.copy()
    half[:, 1] = 2  # all of the second dimension's share of the variance (16 of 20) is lost
    whole = Reconstruction().add(x, half)
    parts = Reconstruction().add(x[:1], half[:1]).add(x[1:], half[1:])
    for found in (whole, parts):
        assert found.rows == 4
        assert found.mean.tolist() == [1, 2]
        assert found.explained_variance == pytest.approx(0.2)
        assert (found.mse, found.mse_of_zero, found.mse_of_mean) == pytest.approx((16 / 8, 40 / 8, 20 / 8))
        # cosines 0 (of a zero embedding), 4 / sqrt(4 * 8), 8 / sqrt(16 * 4), 12 / sqrt(20 * 8)
        assert found.cosine == pytest.approx((0 + 4 / 32**0.5 + 1 + 12 / 160**0.5) / 4)
    assert Reconstruction().add(x, x).explained_variance == 1.0


def test_an_error_that_is_the_same_everywhere_is_not_forgiven() -> None:
    x = np.array([[0.0], [2.0]], np.float32)
    assert Reconstruction().add(x, x + 1).explained_variance == pytest.approx(0.0)


def test_where_nothing_varies_nothing_is_explained() -> None:
    assert explained_variance(0.0, 0.0) == 0.0
    x = np.full((3, 2), 1.5, np.float32)
    assert Reconstruction().add(x, x).explained_variance == 0.0


def test_small_variance_beside_a_large_mean_is_not_lost_to_rounding() -> None:
    x = (np.random.default_rng(0).standard_normal((500, 8)) * 1e-2 + 40).astype(np.float32)
    x_hat = np.broadcast_to(x.mean(0), x.shape).astype(np.float32)
    assert Reconstruction().add(x, x_hat).explained_variance == pytest.approx(0.0, abs=1e-4)
