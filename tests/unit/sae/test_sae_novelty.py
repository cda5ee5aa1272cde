"""How unlike the corpus an embedding is: the formula, what it is learnt from, and the warning in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from faceteer_runtime.bundle import BundleError
from faceteer_sae.features import Encoding, Origin, novelty_warnings
from faceteer_sae.model import FeatureActivations
from faceteer_sae.novelty import FEWEST, QUANTILE, Novelty
from faceteer_sae.statistics import FILE, FeatureStatistics, load_statistics, save_statistics
from safetensors.numpy import load_file, save_file

D = 6


def corpus(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [rows, 6] that vary little along the last axis, and what the SAE leaves of each."""
    rng = np.random.default_rng(seed)
    x = rng.normal(3, [4, 4, 2, 2, 1, 0.01], (rows, D)).astype(np.float32)
    return x, np.square(rng.normal(0, 0.1, (rows, D))).sum(1)


def learnt(rows: int = 8000) -> tuple[Novelty, np.ndarray]:
    x, error = corpus(rows)
    novelty = Novelty.fit(x, error, x.mean(0))
    assert novelty is not None
    return novelty, x.mean(0)


def test_the_score_is_the_sum_of_two_percentile_scores_of_the_corpus() -> None:
    x, error = corpus(8000)
    mean = x.mean(0)
    novelty = Novelty.fit(x, error, mean)
    assert novelty is not None
    axes, judged = (x[::2] - mean).astype(float), (x[1::2] - mean).astype(float)
    covariance = axes.T @ axes / len(axes)
    covariance += np.eye(D) * 1e-4 * np.trace(covariance) / D
    distance = np.sqrt(np.einsum("ij,jk,ik->i", judged, np.linalg.inv(covariance), judged))
    log_fvu = np.log(error[1::2] / np.square(judged).sum(1))
    expected = 0.0
    for values, weight in ((log_fvu, 1.0), (distance, 0.5)):
        middle, high = np.quantile(values, [0.5, 0.995])
        expected = expected + weight * (values - middle) / (high - middle)
    found = np.array([novelty.score(e, s) for e, s in zip(error[1::2], x[1::2] - mean, strict=True)])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert novelty.limit[0] == pytest.approx(np.quantile(expected, QUANTILE), abs=1e-3)
    assert novelty.usual_explained_variance == pytest.approx(1 - np.exp(np.median(log_fvu)), abs=1e-5)


@pytest.mark.parametrize("rows", [1000, 8000])
def test_fresh_pictures_of_the_corpus_kind_pass_and_others_do_not(rows: int) -> None:
    novelty, mean = learnt(rows)
    fresh, error = corpus(5000, seed=1)
    scores = np.array([novelty.score(e, one - mean) for e, one in zip(error, fresh, strict=True)])
    assert (scores > novelty.limit[0]).mean() < 0.015
    assert novelty.score(error[0] * 100, fresh[0] - mean) > novelty.limit[0], "badly explained"
    assert novelty.score(error[0], fresh[0] - mean + [0, 0, 0, 0, 0, 1]) > novelty.limit[0], "where none of them lies"


def test_a_dictionary_wider_than_the_corpus_is_long_does_not_warn_of_its_own_kind() -> None:
    rng = np.random.default_rng(2)
    x, fresh = rng.normal(size=(600, 400)).astype(np.float32), rng.normal(size=(500, 400))
    novelty = Novelty.fit(x, np.square(rng.normal(0, 0.1, x.shape)).sum(1), x.mean(0))
    assert novelty is not None
    scores = [novelty.score(np.square(rng.normal(0, 0.1, 400)).sum(), one - x.mean(0)) for one in fresh]
    assert (np.array(scores) > novelty.limit[0]).mean() < 0.05


def test_too_few_pictures_or_one_over_and_over_teach_nothing() -> None:
    x, error = corpus(FEWEST - 1)
    assert Novelty.fit(x, error, x.mean(0)) is None
    same = np.ones((FEWEST, D), np.float32)
    assert Novelty.fit(same, np.zeros(FEWEST), same[0]) is None


def test_an_embedding_without_error_or_at_the_mean_has_a_finite_score() -> None:
    novelty, _ = learnt()
    assert np.isfinite(novelty.score(0.0, np.ones(D)))
    assert np.isfinite(novelty.score(1.0, np.zeros(D)))


def statistics(novelty: Novelty | None, mean: np.ndarray | None) -> FeatureStatistics:
    none = np.zeros(3, np.float32)
    return FeatureStatistics(none, none, np.zeros(4, np.int64), np.empty(0, np.int32), mean, novelty)


def test_novelty_is_kept_with_the_feature_statistics(tmp_path: Path) -> None:
    novelty, mean = learnt()
    save_statistics(tmp_path, statistics(novelty, mean))
    found = load_statistics(tmp_path, D, 3)
    assert found is not None
    assert found.novelty is not None
    for name, array in vars(novelty).items():
        assert np.array_equal(getattr(found.novelty, name), array), name


@pytest.mark.parametrize("wrong", ["embedding_mean", "novelty.limit", "novelty.whitening"])
def test_half_a_novelty_is_refused(tmp_path: Path, wrong: str) -> None:
    save_statistics(tmp_path, statistics(*learnt()))
    arrays = load_file(tmp_path / FILE)
    arrays.pop(wrong)
    save_file(arrays, tmp_path / FILE)
    with pytest.raises(BundleError, match=wrong):
        load_statistics(tmp_path, D, 3)


def encoding(score: float, explained: float = 0.9) -> Encoding:
    return Encoding(
        FeatureActivations(np.empty(0, np.int32), np.empty(0, np.float32), np.nan), 0, explained, 1, 1, score
    )


def test_the_warning_says_what_is_wrong_and_what_to_do() -> None:
    novelty, mean = learnt()
    limit = float(novelty.limit[0])
    known, origin = statistics(novelty, mean), Origin("postcards", "examples/boat.png")
    (warning,) = novelty_warnings(known, encoding(limit + 1), origin)
    assert (warning.code, warning.value, warning.limit) == ("UNLIKE_THE_CORPUS", limit + 1, limit)
    usual = f"{novelty.usual_explained_variance:.1%}"
    for words in ("'postcards'", "90.0%", usual, "such as examples/boat.png", "docs/your-own-library.md", "compressed"):
        assert words in warning.message
    (plain,) = novelty_warnings(known, encoding(limit + 1, 0.9999), Origin("postcards"))
    assert "%" not in plain.message, "where nothing is wrong with the figures they say nothing"
    assert "such as" not in plain.message
    assert novelty_warnings(known, encoding(limit), origin) == []


def test_bundles_that_cannot_say_do_not_warn() -> None:
    assert novelty_warnings(None, encoding(9.0), Origin("tiny")) == []
    assert novelty_warnings(statistics(None, None), encoding(9.0), Origin("tiny")) == []
    assert novelty_warnings(statistics(*learnt()), encoding(np.nan), Origin("tiny")) == []
