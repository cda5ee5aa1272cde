"""The synthetic corpus: its truth is what its documentation says, and any part of it can be made again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from faceteer_postcards.synthetic import BLOCK, SparseMixtures
from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError

SMALL = SparseMixtures(n_true=128, d=48, mean_active=6, seed=3)


def test_rows_are_the_true_activations_times_the_dictionary_plus_a_little_noise() -> None:
    embeds, acts = SMALL.block(1)
    noise = embeds - acts.dense() @ SMALL.dictionary
    np.testing.assert_allclose(np.linalg.norm(SMALL.dictionary, axis=1), 1, rtol=1e-5)
    assert embeds.dtype == np.float32
    assert embeds.shape == (BLOCK, 48)
    assert np.linalg.norm(noise, axis=1).mean() == pytest.approx(2.0, rel=0.05)
    assert (np.linalg.norm(embeds, axis=1) ** 2).mean() ** 0.5 == pytest.approx(40, rel=0.15)


def test_features_fire_as_often_as_announced_from_common_to_rare() -> None:
    fires = np.concatenate([SMALL.block(i)[1].dense() > 0 for i in range(10)])
    share = SMALL.firing_share
    assert share.sum() == pytest.approx(6, rel=0.1)
    # Five standard errors of a binomial share.
    assert (abs(fires.mean(0) - share) < 5 * np.sqrt(share / len(fires)) + 1e-9).all()
    assert share[4] / share[100] > 50


def test_rivals_never_fire_together_and_followers_never_alone() -> None:
    fires = np.concatenate([SMALL.block(i)[1].dense() > 0 for i in range(10)])
    for first, second in SMALL.rivals:
        assert fires[:, first].mean() > 0.1
        assert not (fires[:, first] & fires[:, second]).any()
    for first, second in SMALL.together:
        assert (fires[:, first] & fires[:, second]).sum() / fires[:, first].sum() == pytest.approx(0.9, abs=0.02)
        assert not (fires[:, second] & ~fires[:, first]).any()


def test_a_block_depends_on_the_settings_and_its_number_alone() -> None:
    again = SparseMixtures(n_true=128, d=48, mean_active=6, seed=3)
    np.testing.assert_array_equal(again.block(2)[0], SMALL.block(2)[0])
    assert not np.array_equal(SMALL.block(2)[0], SMALL.block(3)[0])
    assert not np.array_equal(SMALL.block(2)[0], SparseMixtures(128, 48, 6, seed=4).block(2)[0])


def test_a_written_corpus_reads_back_and_an_interrupted_one_goes_on(tmp_path: Path) -> None:
    SMALL.write(tmp_path, 10_000, "float32", shard_size=BLOCK)
    corpus = EmbeddingCorpus.open(tmp_path, encoder_revision=SMALL.encoder_revision)
    assert len(corpus) == 10_000
    assert not corpus.has_pictures
    np.testing.assert_array_equal(corpus.rows([9_999, 3, 4096]), _rows_from_blocks())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "embeds-00001.safetensors").unlink()
    (tmp_path / "corpus.json").unlink()
    SMALL.write(tmp_path, 10_000, "float32", shard_size=BLOCK)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_folder_of_another_synthetic_corpus_is_refused(tmp_path: Path) -> None:
    SMALL.write(tmp_path, 100)
    with pytest.raises(JobError, match="synthetic-128x48-6-3, but the corpus is of synthetic-128x48-6-4"):
        SparseMixtures(128, 48, 6, seed=4).write(tmp_path, 100)


@pytest.mark.parametrize("settings", [(8, 4, 1), (64, 4, 9), (64, 0, 1)])
def test_settings_that_make_no_corpus_are_refused(settings: tuple[int, int, float]) -> None:
    with pytest.raises(JobError):
        SparseMixtures(*settings)


def _rows_from_blocks() -> np.ndarray:
    """Rows 9,999, 3 and 4,096, straight from their blocks."""
    return np.stack([SMALL.block(2)[0][9_999 - 2 * BLOCK], SMALL.block(0)[0][3], SMALL.block(1)[0][0]])
