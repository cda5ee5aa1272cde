"""The smallest set of edits that carries a difference: against trying every set, and against its own promise."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from faceteer_runtime.errors import InvalidField
from faceteer_sae.diff import diff_features
from faceteer_sae.model import SparseAutoencoder
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.sae import sae_models as models


def share(sae: SparseAutoencoder, indices: np.ndarray, values: np.ndarray, chosen: tuple[int, ...]) -> float:
    """1 - ||D - sum over chosen||^2 / ||D||^2, in float64."""
    c = values.astype(np.float64)[:, None] * sae.directions(indices).astype(np.float64)
    D = c.sum(0)
    rest = D - c[list(chosen)].sum(0)
    return 1 - rest @ rest / (D @ D)


def smallest(sae: SparseAutoencoder, indices: np.ndarray, values: np.ndarray, coverage: float) -> int:
    for size in range(1, len(indices) + 1):
        if any(share(sae, indices, values, some) >= coverage for some in combinations(range(len(indices)), size)):
            return size
    return len(indices)


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99])
def test_the_set_is_nearly_always_the_smallest_there_is(coverage: float) -> None:
    # 40 features in 12 dimensions overlap far more than a trained SAE's.
    more: Counter[int] = Counter()
    for seed in range(40):
        sae = models.sae("topk", seed % 3)
        x, y = models.embedding(2 * seed), models.embedding(2 * seed + 1)
        f, g = sae.encode(np.stack([x, y]))
        union = np.union1d(f.top_indices, g.top_indices)
        values = g.at(union) - f.at(union)
        found = diff_features(sae, x, y, f, g, coverage)
        assert found.coverage >= coverage - 1e-5
        more[len(found.indices) - smallest(sae, union, values, coverage)] += 1
    assert more[0] >= 36
    assert set(more) <= {0, 1, 2}


def test_with_orthogonal_features_the_set_is_the_smallest() -> None:
    eye = torch.eye(models.D_IN)
    weights = {"W_enc": eye, "b_enc": torch.zeros(12), "W_dec": eye, "b_dec": torch.zeros(12)}
    sae = SparseAutoencoder(models.SaeConfig("standard", 12, 12, 0, False, {}), weights)
    x, y = np.zeros(12, np.float32), np.arange(12, dtype=np.float32)
    f, g = sae.encode(np.stack([x, y]))
    found = diff_features(sae, x, y, f, g, 0.7)
    # Squares of 11, 10, 9 are 302 of 506: 60 %; with 8's 64, 72 %.
    assert found.indices.tolist() == [11, 10, 9, 8]
    assert found.values.tolist() == [11, 10, 9, 8]
    assert found.coverage == pytest.approx(366 / 506)
    assert found.differing == 11
    assert found.unexplained == pytest.approx(0)


@given(seed=st.integers(0, 2**16), coverage=st.floats(0.05, 1.0), architecture=st.sampled_from(models.ARCHITECTURES))
@settings(max_examples=60)
def test_the_edits_carry_what_they_say(seed: int, coverage: float, architecture: str) -> None:
    sae = models.sae(architecture)
    x, y = models.embedding(seed), models.embedding(seed + 1)
    f, g = sae.encode(np.stack([x, y]))
    found = diff_features(sae, x, y, f, g, coverage)
    difference = models.dense(g) - models.dense(f)
    assert found.differing == np.count_nonzero(difference)
    assert np.array_equal(found.values, difference[found.indices])
    assert len(np.unique(found.indices)) == len(found.indices)
    D = sae.decode(g.top_indices, g.top_acts) - sae.decode(f.top_indices, f.top_acts)
    rest = D - sae.combine(found.indices, found.values)
    assert found.coverage == pytest.approx(1 - (rest @ rest) / (D @ D), abs=1e-4)
    assert found.coverage >= coverage - 1e-4
    contributions = (found.values[:, None] * sae.directions(found.indices)) @ D
    assert (np.diff(contributions) <= 1e-3 * np.abs(contributions).max()).all()
    errors = (y - x) - D
    assert found.unexplained == pytest.approx((errors @ errors) / ((y - x) @ (y - x)), rel=1e-3, abs=1e-5)


def test_the_limit_on_edits_may_leave_less_than_asked() -> None:
    sae, x, y = models.sae("standard"), models.embedding(1), models.embedding(2)
    f, g = sae.encode(np.stack([x, y]))
    found = diff_features(sae, x, y, f, g, 0.999, max_edits=2)
    assert len(found.indices) <= 2
    assert found.coverage < 0.999


def test_equal_embeddings_need_no_edits() -> None:
    sae, x = models.sae("jumprelu"), models.embedding(1)
    (f,) = sae.encode(x[None])
    found = diff_features(sae, x, x, f, f, 0.9)
    assert (len(found.indices), found.coverage, found.differing, found.unexplained) == (0, 1.0, 0, 0.0)


@pytest.mark.parametrize("coverage", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(coverage: float) -> None:
    sae, x = models.sae("standard"), models.embedding(1)
    (f,) = sae.encode(x[None])
    with pytest.raises(InvalidField) as caught:
        diff_features(sae, x, x, f, f, coverage)
    assert caught.value.field == "coverage"
