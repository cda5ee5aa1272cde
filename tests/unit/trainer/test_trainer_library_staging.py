"""A build and what is around it: killed, a full disk, another corpus, a library apart; and what estimates are worth."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from faceteer_library.editor import LibraryEditor
from faceteer_runtime.bundle import Bundle, BundleError, verify
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.rivals import find_rivals
from faceteer_sae.weights import SaeWeights, write_weights
from faceteer_trainer.__main__ import main
from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.library import staging
from faceteer_trainer.library.activations import ActivationStore
from faceteer_trainer.library.encoding import Active
from faceteer_trainer.library.measure import BuildSettings, encode_corpus, find_coactivating, measure
from faceteer_trainer.library.run import build_library
from faceteer_trainer.library.tallies import Pairs
from tiny_corpus import Corpus, D, make_corpus, write_corpus


@pytest.fixture
def corpus(tiny_bundle: Path, tmp_path: Path) -> Corpus:
    return make_corpus(tiny_bundle, tmp_path)


def quiet(step: str, share: float) -> None:
    """No progress."""


def content(bundle: Path) -> dict[str, bytes]:
    return {
        path.relative_to(bundle).as_posix(): path.read_bytes()
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and ".build-library" not in path.parts
    }


def sparse_of(dense: np.ndarray) -> Active:
    rows, columns = np.nonzero(dense)
    indptr = np.concatenate([[0], np.cumsum((dense > 0).sum(1))]).astype(np.int64)
    return Active(indptr, columns.astype(np.int32), dense[rows, columns].astype(np.float32))


SHORT = """
import resource, sys
from faceteer_trainer.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
main(["build-library", "--corpus", sys.argv[1], "--bundle", sys.argv[2]])
"""


@pytest.mark.parametrize("limit", [2_000, 60_000])
def test_a_full_disk_is_one_sentence_and_the_bundle_stays_as_it_was(corpus: Corpus, limit: int) -> None:
    # A file may grow to so many bytes: too few for the activations, or for the library after them.
    before = content(corpus.bundle)
    command = [sys.executable, "-c", SHORT, corpus.directory, corpus.bundle, str(limit)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "make room and run" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert content(corpus.bundle) == before
    build_library(corpus.directory, corpus.bundle, BuildSettings())
    verify(corpus.bundle)


def test_a_build_killed_while_its_files_are_put_in_place_is_finished_by_the_next(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(corpus.bundle, whole)
    build_library(corpus.directory, whole, BuildSettings())
    replace, moved = os.replace, []

    class Killed(BaseException):
        pass

    def until_the_second(source: Path, target: Path) -> None:
        if "staging" in str(source) and "staging" not in str(target):
            if moved:
                raise Killed
            moved.append(target)
        replace(source, target)

    monkeypatch.setattr(staging.os, "replace", until_the_second)
    with pytest.raises(Killed):
        build_library(corpus.directory, corpus.bundle, BuildSettings())
    monkeypatch.undo()
    with pytest.raises(BundleError):
        verify(corpus.bundle)
    assert staging.commit(corpus.bundle / ".build-library" / "staging", corpus.bundle)
    verify(corpus.bundle)
    sae = "sae/feature_statistics.safetensors"
    assert content(corpus.bundle)[sae] == content(whole)[sae]
    assert Bundle.open(corpus.bundle).part("sae").revision == Bundle.open(whole).part("sae").revision
    assert not staging.commit(corpus.bundle / ".build-library" / "staging", corpus.bundle)


def test_a_library_of_its_own_leaves_the_bundle_as_it_is(corpus: Corpus, tmp_path: Path) -> None:
    before, out = content(corpus.bundle), tmp_path / "apart.sqlite"
    work = tmp_path / "work"
    work.mkdir()
    (work / "mine.txt").write_text("not yours")
    options = ["--corpus", corpus.directory, "--bundle", corpus.bundle, "--out", out, "--work", work]
    main(["build-library", *map(str, options)])
    assert content(corpus.bundle) == before
    assert [path.name for path in work.iterdir()] == ["mine.txt"]
    with LibraryEditor(out) as editor:
        assert editor.facts["sae_revision"] == Bundle.open(corpus.bundle).part("sae").revision


def test_statistics_that_are_kept_keep_the_revision(corpus: Corpus) -> None:
    before = Bundle.open(corpus.bundle).part("sae").revision
    build_library(corpus.directory, corpus.bundle, BuildSettings(), keep_statistics=True)
    assert Bundle.open(corpus.bundle).part("sae").revision == before
    verify(corpus.bundle)


def test_activations_of_another_corpus_of_the_same_name_are_not_gone_on_with(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write = ActivationStore.write

    def once(self: ActivationStore, first: int, active: Active) -> None:
        write(self, first, active)
        raise KeyboardInterrupt

    monkeypatch.setattr(ActivationStore, "write", once)
    with pytest.raises(KeyboardInterrupt):
        build_library(corpus.directory, corpus.bundle, BuildSettings())
    monkeypatch.undo()
    other = tmp_path / "other"
    write_corpus(other, corpus.embeds[::-1], Bundle.open(corpus.bundle).part("encoder").revision)
    with pytest.raises(JobError, match=r"an unfinished build with another corpus .* is in the way"):
        build_library(other, corpus.bundle, BuildSettings())


def test_no_gpu_is_one_sentence(corpus: Corpus) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(JobError, match="no such GPU here"):
        build_library(corpus.directory, corpus.bundle, BuildSettings(), device="cuda")


def test_a_bundle_that_names_no_encoder_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    from faceteer_runtime.bundle import seal

    alone = tmp_path / "alone"
    shutil.copytree(corpus.bundle / "sae", alone / "sae")
    seal(alone, {"name": "alone", "parts": {"sae": {}}})
    with pytest.raises(JobError, match="does not say for which encoder"):
        build_library(corpus.directory, alone, BuildSettings())


def _sae(directory: Path, d_sae: int, bias: float) -> SparseAutoencoder:
    W = torch.nn.functional.normalize(torch.randn(d_sae, D, generator=torch.Generator().manual_seed(1)), dim=1)
    write_weights(directory, SaeWeights("standard", W, torch.full((d_sae,), bias), W, torch.zeros(D), True), "float32")
    return SparseAutoencoder.load(directory)


def test_a_small_dictionary_may_fire_by_half_and_a_large_one_is_taken_for_a_mistake(
    corpus: Corpus, tmp_path: Path
) -> None:
    embeds = EmbeddingCorpus.open(corpus.directory)
    small = ActivationStore(tmp_path / "small", {})
    encode_corpus(embeds, _sae(tmp_path / "sae-small", 900, 0.0), small, quiet)
    assert sum(len(active.indices) for _, active in small.blocks()) > 300 * len(embeds)
    with pytest.raises(JobError, match=r"of 4000 features fire on a picture .* which no trained SAE does"):
        encode_corpus(embeds, _sae(tmp_path / "sae-large", 4000, 0.0), ActivationStore(tmp_path / "large", {}), quiet)


def test_partners_of_features_with_few_pictures_are_exact_though_estimated(tmp_path: Path) -> None:
    # 40 features that fire on at most 64 of 1,500 pictures each: the sample holds all of their pictures.
    rng = np.random.default_rng(2)
    topic = rng.integers(0, 20, 1500)
    acts = np.zeros((1500, 40), np.float32)
    for feature in range(40):
        rows = rng.choice(np.flatnonzero(topic == feature // 2), 40, replace=False)
        rows = np.append(rows, rng.choice(1500, 20))
        acts[rows, feature] = rng.random(len(rows)) + 0.1
    store = ActivationStore(tmp_path / "a", {})
    store.write(0, sparse_of(acts[:700]))
    store.write(700, sparse_of(acts[700:]))
    counted, estimated = (
        find_coactivating(store, measure(store, 1500, 40, settings, quiet), settings, quiet)
        for settings in (BuildSettings(common=40), BuildSettings(common=0))
    )
    assert sum(map(len, counted.values())) >= 40
    for feature in range(40):
        assert dict(estimated[feature]) == pytest.approx(dict(counted[feature]))


def test_an_estimated_share_is_off_by_no_more_than_chance(tmp_path: Path) -> None:
    # 30 pairs: b fires on 40 % of the some 400 pictures of a, and a's share is estimated from 64 of them.
    rng = np.random.default_rng(3)
    fires = rng.random((4000, 60)) < 0.1
    for feature in range(0, 60, 2):
        fires[:, feature + 1] &= ~fires[:, feature]
        rows = np.flatnonzero(fires[:, feature])
        fires[rng.choice(rows, int(0.4 * len(rows)), replace=False), feature + 1] = True
    store = ActivationStore(tmp_path / "a", {})
    store.write(0, sparse_of(fires.astype(np.float32)))
    settings = BuildSettings(common=0, relatives=60)
    found = find_coactivating(store, measure(store, 4000, 60, settings, quiet), settings, quiet)
    errors = []
    for feature in range(0, 60, 2):
        exact = (fires[:, feature] & fires[:, feature + 1]).sum() / fires[:, feature].sum()
        estimate = dict(found[feature])[feature + 1] * fires[:, feature + 1].mean()
        errors.append((estimate - exact) / np.sqrt(exact * (1 - exact) / 64))
    # In units of the binomial standard error, 0.06 here; without replacement a little less than 1.
    assert 0.6 < np.sqrt(np.mean(np.square(errors))) < 1.3
    assert np.abs(np.mean(errors)) < 0.6


def test_rivals_are_the_same_where_much_fires_and_pairs_are_counted_by_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    import faceteer_trainer.library.tallies as tallies

    monkeypatch.setattr(tallies, "_SLAB", 7)
    rng = np.random.default_rng(4)
    dense = rng.random((2000, 30)) < 0.3
    dense[:, 1::2] &= ~dense[:, ::2]
    pairs = Pairs(np.arange(30), 30)
    pairs.add(sparse_of(dense[:900].astype(np.float32)))
    pairs.add(sparse_of(dense[900:].astype(np.float32)))
    found = find_rivals(pairs.features, pairs.together, dense.sum(0), 2000)
    together = dense.T.astype(int) @ dense
    assert np.array_equal(pairs.together, together)
    expected = together == 0
    assert expected.sum() == 30
    assert np.array_equal(found.indices, expected.nonzero()[1])
    assert np.array_equal(np.diff(found.offsets), expected.sum(1))
    assert found.best(0, 5) == [(1, 0.0)]
