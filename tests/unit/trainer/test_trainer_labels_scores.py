"""Names and scores of labels against numbers done by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from faceteer_runtime.bundle import Bundle
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.statistics import FeatureStatistics
from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.icons import edited
from faceteer_trainer.labels import naming
from faceteer_trainer.labels.naming import name_features, strong_pictures
from faceteer_trainer.labels.quality import sae_figures
from faceteer_trainer.labels.sample import Side, take_sample
from faceteer_trainer.labels.scores import agree, balanced_sample, best_threshold, causal_score, detect, moves_of
from faceteer_trainer.library.templates import least_in_common, template_of
from scipy import sparse
from tiny_corpus import D, write_corpus


def test_the_causal_score_is_what_is_done_by_hand() -> None:
    texts = np.eye(3, dtype=np.float32)
    # From the template (norm 5) to three strengths: by 4 towards label 0 and 3 towards 1, by 2 towards 2 alone, and by
    # 0.4, which is less than a tenth of the norm and does not count. The weights are 5 - 0.5 and 2 - 0.5.
    embeds = np.array([[3, 4, 0], [7, 7, 0], [3, 4, 2], [3, 3.6, 0]], np.float32)

    def score(label: int) -> float | None:
        return causal_score(*moves_of(embeds, texts), label)

    assert score(0) == pytest.approx((4.5 * 1 + 1.5 * 0.25) / 6)  # beats both; ties with 1 only
    assert score(1) == pytest.approx((4.5 * 0.5 + 1.5 * 0.25) / 6)
    assert score(2) == pytest.approx((4.5 * 0 + 1.5 * 1) / 6)


def test_what_a_feature_causes_is_not_measured_on_an_icon_that_shows_no_change() -> None:
    embeds = np.array([[3, 4, 0], [3.3, 4, 0], [3.4, 4, 0.1]], np.float32)
    assert causal_score(*moves_of(embeds, np.eye(3, dtype=np.float32)), 0) is None


def test_an_icon_switches_its_feature_on_and_its_rivals_off() -> None:
    class Active:
        def at(self, indices: np.ndarray) -> np.ndarray:
            return np.array([0.5, 2, 3], np.float32)[indices]

    class Sae:
        @staticmethod
        def encode(x: np.ndarray) -> list[Active]:
            return [Active()]

        @staticmethod
        def directions(indices: np.ndarray) -> np.ndarray:
            return np.eye(3, dtype=np.float32)[indices]

    # Feature 0 has one rival, 1; its 99th percentile is 4.
    statistics = FeatureStatistics(np.ones(3), np.array([4, 1, 1], np.float32), np.array([0, 1, 1, 1]), np.array([1]))
    template = np.array([10, 10, 10], np.float32)
    pictures = edited(Sae(), statistics, template, 0, (0.5, 1.0))  # type: ignore[arg-type]
    assert pictures.tolist() == [[10 + 2 - 0.5, 8, 10], [10 + 4 - 0.5, 8, 10]]
    alone = edited(Sae(), statistics, template, 1, (1.0,))  # type: ignore[arg-type]
    assert alone.tolist() == [[10, 9, 10]]


def test_a_feature_that_is_on_in_the_template_starts_from_the_picture_least_like_it() -> None:
    # Features 0 and 1 are on in the first template; 2 is hardly on, and 3 is dead.
    p99 = np.array([1, 2, 1, 0], np.float32)
    first = np.array([1, 0.5, 0.1, 0], np.float32)
    acts = np.zeros((4, 4))
    acts[0] = [0.9, 0, 0, 0]
    acts[1] = [0, 0, 3, 0]  # shares nothing that counts, but is far from the mean
    acts[2] = [0, 0, 3, 0]
    acts[3] = [0, 2, 0, 0]
    embeds = np.array([[0, 0], [5, 5], [1, 0], [0, 0]], np.float32)
    chosen = least_in_common(first, sparse.csc_matrix(acts), p99, embeds, np.zeros(2, np.float32))
    assert chosen == 2
    templates, scaled = [embeds[3], embeds[2]], [first, np.array([0.9, 0, 3, 0], np.float32)]
    assert template_of(0, templates, scaled) is templates[1]
    assert template_of(1, templates, scaled) is templates[1]
    assert template_of(2, templates, scaled) is templates[0]
    assert template_of(0, templates, [first, first + 1]) is templates[0]
    assert template_of(0, templates[:1], scaled[:1]) is templates[0]


def test_the_threshold_is_the_one_that_tells_most() -> None:
    scores = np.array([0.9, 0.8, 0.4, 0.3, 0.1])
    fires = np.array([True, True, False, True, False])
    assert best_threshold(scores, fires) == pytest.approx(0.6)


def side(embeds: np.ndarray, acts: np.ndarray) -> Side:
    return Side(np.arange(len(embeds)), embeds.astype(np.float32), sparse.csc_matrix(acts.astype(np.float32)))


def test_detection_is_one_for_a_label_that_tells_and_a_half_for_one_that_does_not() -> None:
    rng = np.random.default_rng(0)
    fires = rng.random(600) < 0.2
    embeds = rng.standard_normal((600, 4))
    embeds[:, 0] = np.where(fires, 3.0, -1.0)
    pictures = side(embeds, np.where(fires, 1.0 + rng.random(600), 0.0)[:, None])
    told = detect(pictures, pictures, 0, np.array([1, 0, 0, 0], np.float32))
    assert told == (1.0, 1.0)
    blind = detect(pictures, pictures, 0, np.array([0, 1, 0, 0], np.float32))
    assert blind is not None
    assert abs(blind.auc - 0.5) < 0.1
    few = side(embeds[:6], np.ones((6, 1)))
    assert detect(few, few, 0, np.ones(4, np.float32)) is None


def test_the_threshold_comes_from_the_pictures_that_the_label_was_made_from() -> None:
    fires = np.arange(40) < 20
    acts = fires[:, None].astype(float)
    text = np.array([1, 0], np.float32)
    # Made from pictures that score 3 and -1: the threshold is 1. The pictures that judge score 0.5 and -1, which
    # another threshold would tell apart; this one calls all of them silent.
    making = side(np.stack([np.where(fires, 3.0, -1.0), np.zeros(40)], 1), acts)
    judging = side(np.stack([np.where(fires, 0.5, -1.0), np.zeros(40)], 1), acts)
    assert detect(making, judging, 0, text) == (1.0, 0.5)
    assert detect(judging, making, 0, text) == (1.0, 1.0)


def test_a_sample_of_pictures_holds_as_many_that_fire_as_silent_ones_and_needs_eight_of_each() -> None:
    acts = np.zeros((600, 3))
    acts[:8, 0] = acts[:7, 1] = acts[:300, 2] = 1.0
    pictures = side(np.zeros((600, 2)), acts)
    found = balanced_sample(pictures, 0)
    assert found is not None
    rows, fires = found
    assert sorted(rows[fires].tolist()) == list(range(8))
    assert len(set(rows[~fires].tolist())) == 8
    assert rows[~fires].min() >= 8
    assert balanced_sample(pictures, 1) is None
    most = balanced_sample(pictures, 2)
    assert most is not None
    assert (len(most[0]), int(most[1].sum())) == (400, 200)


def test_scores_agree_when_both_say_the_same() -> None:
    assert [agree(0.9, 0.8), agree(0.5, 0.5), agree(0.9, 0.5), agree(0.5, 0.9)] == [True, True, False, False]
    assert agree(None, 0.9) is agree(0.9, None) is None
    assert [agree(0.7, 0.7), agree(0.7, 0.69), agree(0.69, 0.7)] == [True, False, False]


class Space:
    """Four words at right angles."""

    terms = ("cat", "red car", "red boat", "snow")
    directions = np.eye(4, dtype=np.float32)


def test_a_feature_is_named_by_what_stands_out_on_its_pictures() -> None:
    rng = np.random.default_rng(1)
    embeds = 0.3 * rng.standard_normal((500, 4))
    acts = np.zeros((500, 4))
    acts[:50, 0] = 1 + rng.random(50)
    embeds[:50, 3] += 2
    acts[100:150, 1] = 1 + rng.random(50)
    embeds[100:150, 1] += 2
    embeds[100:150, 2] += 1.8
    # All of them are in snow, the weak ones too; the strong ones happen to show a cat.
    acts[150:250, 3] = np.repeat([0.2, 1], [75, 25])
    embeds[150:250, 3] += 1.5
    embeds[225:250, 0] += 2
    acts[200:, 2] = rng.random(300)
    found = name_features(side(embeds, acts), Space(), np.arange(4), 1.0, 0.65)  # type: ignore[arg-type]
    assert found[0].label == "snow"
    # "red boat" would be as good, but says "red" again.
    assert (found[1].label, found[1].terms) == ("red car", ())
    z = (embeds[100:150, 1].mean() - embeds[:, 1].mean()) / embeds[:, 1].std()
    assert (found[1].z, found[1].auc) == (pytest.approx(z, rel=1e-5), 1.0)
    assert 2 not in found
    assert (found[3].label, found[3].terms) == ("snow", ())


def test_features_beyond_one_block_are_named_for_their_own_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "_BLOCK", 2)
    rng = np.random.default_rng(3)
    embeds, acts = 0.1 * rng.standard_normal((300, 4)), np.zeros((300, 5))
    for feature, word in enumerate((2, 0, 3, 1, 2)):
        rows = slice(60 * feature, 60 * feature + 60)
        acts[rows, feature] = 1 + rng.random(60)
        embeds[rows, word] += 2
    found = name_features(side(embeds, acts), Space(), np.array([0, 1, 2, 3, 4]), 1.0, 0.65)  # type: ignore[arg-type]
    assert [found[feature].label for feature in range(5)] == ["red boat", "cat", "snow", "red car", "red boat"]


def test_the_strong_pictures_of_a_feature_are_those_from_half_its_p99_on_strongest_first() -> None:
    # The 99th percentile of what fires is 1.
    pictures = side(np.zeros((9, 1)), np.array([0.5, 1, 0.49, 1, 0.75, 1, 1, 1, 0])[:, None])
    assert strong_pictures(pictures, 0).tolist() == [1, 3, 5, 6, 7, 4, 0]
    few = side(np.zeros((7, 1)), np.array([1, 1, 1, 1, 0, 0, 0.0])[:, None])
    assert strong_pictures(few, 0).tolist() == []


def test_a_name_must_stand_out_and_tell_weak_firings_too() -> None:
    rng = np.random.default_rng(5)
    embeds, acts = 0.3 * rng.standard_normal((400, 4)), np.zeros((400, 2))
    acts[:100, 0] = np.repeat([1.0, 0.2], [35, 65])
    embeds[:35, 0] += 2.0  # a cat, where it fires strongly: z 3, but chance elsewhere
    embeds[:100, 3] += 1.5  # snow, wherever it fires: z less than 2, but every picture is told
    acts[200:260, 1] = 1.0
    embeds[200:260, 2] += 0.35  # a red boat: tells well, but hardly stands out
    pictures = side(embeds, acts)
    found = name_features(pictures, Space(), np.array([0, 1]), 0.5, 0.55)  # type: ignore[arg-type]
    assert found[0].label == "snow"
    assert found[1].label == "red boat"
    assert 0.8 < found[1].z < 1.2
    assert 1 not in name_features(pictures, Space(), np.array([0, 1]), 1.2, 0.55)  # type: ignore[arg-type]
    assert 1 not in name_features(pictures, Space(), np.array([0, 1]), 0.5, 0.95)  # type: ignore[arg-type]


def test_a_sample_has_two_sides_that_no_picture_ever_changes(tiny_bundle: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    # More than the 4,096 that are encoded at a time.
    embeds = rng.standard_normal((5000, D)).astype(np.float32)
    revision = Bundle.open(tiny_bundle).part("encoder").revision
    write_corpus(tmp_path / "corpus", embeds, revision)
    corpus, sae = EmbeddingCorpus.open(tmp_path / "corpus"), SparseAutoencoder.load(tiny_bundle / "sae")
    sample = take_sample(corpus, sae, 5000)
    making, judging = set(sample.making.rows.tolist()), set(sample.judging.rows.tolist())
    assert making | judging == set(range(5000))
    assert not making & judging
    assert 0.57 < len(making) / 5000 < 0.63
    np.testing.assert_allclose(sample.mean, embeds.mean(0), atol=1e-5)
    for part in (sample.making, sample.judging):
        centred = embeds[part.rows] - embeds.mean(0)
        np.testing.assert_allclose(part.embeds, centred / np.linalg.norm(centred, axis=1, keepdims=True), atol=1e-5)
        for place in (0, len(part.rows) - 1):
            (active,) = sae.encode(embeds[part.rows[place] : part.rows[place] + 1])
            row = part.acts[place].tocoo()
            assert dict(zip(row.col.tolist(), row.data, strict=True)) == pytest.approx(
                dict(zip(active.top_indices.tolist(), active.top_acts, strict=True)), rel=1e-4
            )
    few = take_sample(corpus, sae, 50)
    assert len(few.making.rows) + len(few.judging.rows) == 50
    assert set(few.making.rows.tolist()) <= making
    assert set(few.judging.rows.tolist()) <= judging


def test_the_figures_of_an_sae_are_what_is_done_by_hand() -> None:
    class Sae:
        b_dec = np.array([1, 0], np.float32)

        @staticmethod
        def directions(indices: np.ndarray) -> np.ndarray:
            return np.array([[1, 0], [9, 9], [0, 2]], np.float32)[indices]

    x = np.array([[2, 2], [4, 0], [1, 4]], np.float32)
    acts = sparse.csc_matrix(np.array([[1, 0, 1], [2, 0, 0], [0, 0, 2]], np.float32))
    # x_hat: (2, 2), (3, 0), (1, 4): one value is off by 1. The variance about the mean (7/3, 2) is 14/3 + 8.
    figures = sae_figures(Sae(), x, acts)  # type: ignore[arg-type]
    assert figures == {
        "explained_variance": pytest.approx(1 - 1 / (14 / 3 + 8)),
        "cosine": pytest.approx(1),
        "l0": pytest.approx(4 / 3),
        "pictures": 3,
    }
