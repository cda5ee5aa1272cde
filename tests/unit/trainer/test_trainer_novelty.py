"""What tells pictures unlike a corpus, learnt by every job that measures an SAE on one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from faceteer_library.editor import LibraryEditor
from faceteer_runtime.bundle import Bundle, verify
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.novelty import Novelty
from faceteer_sae.statistics import FeatureStatistics, load_statistics
from faceteer_trainer.__main__ import main
from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.sae import statistics as measuring
from faceteer_trainer.sae.autoencoder import Autoencoder
from tiny_bundle import N_FEATURES
from tiny_corpus import Corpus, D, make_corpus, write_corpus


@pytest.fixture
def corpus(tiny_bundle: Path, tmp_path: Path) -> Corpus:
    return make_corpus(tiny_bundle, tmp_path)


def of_bundle(bundle: Path) -> FeatureStatistics:
    found = load_statistics(bundle / "sae", D, N_FEATURES)
    assert found is not None
    return found


def expected(corpus: Corpus) -> Novelty:
    sae = SparseAutoencoder.load(corpus.bundle / "sae")
    found = sae.encode(corpus.embeds)
    left = [x - sae.decode(one.top_indices, one.top_acts) for x, one in zip(corpus.embeds, found, strict=True)]
    novelty = Novelty.fit(corpus.embeds, np.square(left).sum(1), corpus.embeds.mean(0))
    assert novelty is not None
    return novelty


def assert_same(found: Novelty | None, wanted: Novelty) -> None:
    assert found is not None
    for name, array in vars(wanted).items():
        if name != "whitening":  # whose axes have a sign that nothing fixes
            np.testing.assert_allclose(getattr(found, name), array, rtol=1e-3, atol=1e-3, err_msg=name)
    np.testing.assert_allclose(
        found.whitening.T @ found.whitening, wanted.whitening.T @ wanted.whitening, rtol=1e-3, atol=1e-2
    )


def test_a_library_brings_novelty_along(corpus: Corpus) -> None:
    main(["build-library", "--corpus", str(corpus.directory), "--bundle", str(corpus.bundle)])
    assert_same(of_bundle(corpus.bundle).novelty, expected(corpus))


def test_an_sae_measured_on_a_corpus_has_novelty_from_at_most_so_many_rows(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, sae = EmbeddingCorpus.open(corpus.directory), Autoencoder.load(corpus.bundle / "sae")
    assert_same(measuring.measure(sae, opened, 10_000).statistics.novelty, expected(corpus))
    monkeypatch.setattr(measuring, "NOVELTY_ROWS", 450)
    monkeypatch.setattr(measuring, "_CHUNK", 7)
    every_other = corpus._replace(embeds=corpus.embeds[::2])
    found = measuring.measure(sae, opened, 10_000).statistics.novelty
    assert found is not None
    np.testing.assert_allclose(found.limit, expected(every_other).limit, rtol=0.05)


def test_a_finished_bundle_is_given_novelty_and_keeps_the_rest(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["build-library", "--corpus", str(corpus.directory), "--bundle", str(corpus.bundle)])
    before, revision = of_bundle(corpus.bundle), Bundle.open(corpus.bundle).part("sae").revision
    other = corpus.directory.with_name("other")
    write_corpus(other, corpus.embeds[::2], Bundle.open(corpus.bundle).part("encoder").revision)
    capsys.readouterr()
    main(["learn-novelty", "--corpus", str(other), "--bundle", str(corpus.bundle)])
    assert "a picture is warned about" in capsys.readouterr().out
    after, bundle = of_bundle(corpus.bundle), verify(corpus.bundle)
    assert np.array_equal(after.p99, before.p99)
    assert np.array_equal(after.rivals_indices, before.rivals_indices)
    assert after.novelty is not None
    assert before.novelty is not None
    assert not np.array_equal(after.novelty.whitening, before.novelty.whitening)
    assert bundle.part("sae").revision != revision
    with LibraryEditor(corpus.bundle / "library" / "library.sqlite") as editor:
        assert editor.facts["sae_revision"] == bundle.part("sae").revision
    assert not list(corpus.bundle.glob(".learn*"))


def test_too_small_a_corpus_is_refused_and_changes_nothing(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    main(["build-library", "--corpus", str(corpus.directory), "--bundle", str(corpus.bundle)])
    revision = Bundle.open(corpus.bundle).part("sae").revision
    small = corpus.directory.with_name("small")
    write_corpus(small, corpus.embeds[:300], Bundle.open(corpus.bundle).part("encoder").revision)
    with pytest.raises(SystemExit):
        main(["learn-novelty", "--corpus", str(small), "--bundle", str(corpus.bundle)])
    assert "300 pictures; 400 different ones are the fewest" in capsys.readouterr().err
    assert verify(corpus.bundle).part("sae").revision == revision
