"""A library from embeddings: every figure against an exact computation, and a build that can be stopped at any time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faceteer_library.editor import LibraryEditor
from faceteer_library.store import Store
from faceteer_runtime.bundle import Bundle, BundleError, seal, verify
from faceteer_sae.statistics import load_statistics, save_statistics
from faceteer_trainer.__main__ import main
from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.files import locked
from faceteer_trainer.library import measure, writing
from faceteer_trainer.library.measure import BuildSettings
from faceteer_trainer.library.run import build_library
from tiny_bundle import N_FEATURES
from tiny_corpus import ROWS, Corpus, D, dense_features, make_corpus, write_corpus


@pytest.fixture
def corpus(tiny_bundle: Path, tmp_path: Path) -> Corpus:
    return make_corpus(tiny_bundle, tmp_path)


def test_the_library_says_what_a_plain_computation_says(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    before = Bundle.open(corpus.bundle).part("sae").revision
    main(["build-library", "--corpus", str(corpus.directory), "--bundle", str(corpus.bundle), "--examples", "5"])
    assert "of 64 features fire on 900 pictures" in capsys.readouterr().out
    assert not (corpus.bundle / ".build-library").exists()
    verify(corpus.bundle)
    acts = dense_features(corpus)
    centred = corpus.embeds - corpus.embeds.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    with LibraryEditor(corpus.bundle / "library" / "library.sqlite") as editor:
        assert editor.facts["sae_revision"] == Bundle.open(corpus.bundle).part("sae").revision != before
        assert editor.facts["n_pictures"] == "900"
        described = list(editor.features())
        assert len(described) == N_FEATURES
        for feature, row in enumerate(described):
            positive = acts[:, feature][acts[:, feature] > 0]
            assert row.firing_share == pytest.approx(len(positive) / ROWS)
            assert row.max == pytest.approx(positive.max(initial=0), rel=1e-5)
            examples = editor.examples(feature)
            order: list[int] = []
            for r in np.argsort(-acts[:, feature], kind="stable")[:15]:
                if acts[r, feature] > 0 and (unit[order] @ unit[r] <= 0.98).all() and len(order) < 5:
                    order.append(int(r))
            assert [example.picture for example in examples] == [f"p{row}" for row in order]
            if examples:
                assert examples[0].thumbnail == f"webp {order[0]}".encode()
                assert examples[0].caption == f"caption {order[0]}"
            for example in editor.examples(feature, "quantiles"):
                below = (positive < example.activation).mean() + 0.5 / len(positive)
                # A bin of the sketch is 2 % wide; where a feature fires on a few pictures only, several may share one.
                slack = 0.06 if len(positive) > 100 else 0.2
                assert example.quantiles[0] - slack <= below <= example.quantiles[1] + slack
    statistics = load_statistics(corpus.bundle / "sae", D, N_FEATURES)
    assert statistics is not None
    assert np.allclose(statistics.firing_share, (acts > 0).mean(0))
    # One measurement: what the library says of a feature the SAE says too.
    assert [row.firing_share for row in described] == statistics.firing_share.tolist()
    assert [row.p99 for row in described] == statistics.p99.tolist()
    strong = (acts > 0.3 * statistics.p99).astype(np.float64)
    share, together = strong.mean(0), strong.T @ strong
    chance = len(acts) * np.outer(share, share)
    expected = (together < 0.1 * chance) & (chance >= 20) & (share >= 0.01) & (share[:, None] >= 0.01)
    np.fill_diagonal(expected, False)
    assert expected.any()
    for feature in range(N_FEATURES):
        assert statistics.rivals(feature).tolist() == np.flatnonzero(expected[feature]).tolist()


def test_a_library_beside_statistics_that_stay_has_their_unit(corpus: Corpus, tmp_path: Path) -> None:
    found = load_statistics(corpus.bundle / "sae", D, N_FEATURES)
    assert found is not None
    # Of another corpus: on that one feature 3 never fired.
    p99 = found.p99 * 1.5
    p99[3] = 0.0
    save_statistics(corpus.bundle / "sae", replace(found, p99=p99))
    seal(corpus.bundle)
    build_library(corpus.directory, corpus.bundle, BuildSettings(), keep_statistics=True)
    build_library(corpus.directory, corpus.bundle, BuildSettings(), out=tmp_path / "elsewhere.sqlite")
    for path in (corpus.bundle / "library" / "library.sqlite", tmp_path / "elsewhere.sqlite"):
        with LibraryEditor(path) as editor:
            described = list(editor.features())
        assert [row.p99 for row in described] == p99.tolist()
        assert described[3].firing_share == 0
        assert sum(row.firing_share > 0 for row in described) > 20


def test_rare_features_partners_are_estimated_from_samples_as_well_as_counted(corpus: Corpus) -> None:
    def partners(common: int) -> dict[int, list[int]]:
        bundle = corpus.bundle.with_name(f"bundle-{common}")
        shutil.copytree(corpus.bundle, bundle)
        build_library(corpus.directory, bundle, BuildSettings(common=common))
        store = Store(bundle / "library" / "library.sqlite", bundle / "people.sqlite")
        return {f: [row[0] for row in store.relatives(f, "coactivating")] for f in range(N_FEATURES)}

    counted, estimated = partners(64), partners(8)
    both = [f for f in range(N_FEATURES) if counted[f] and estimated[f]]
    assert len(both) > 20
    overlap = [len(set(counted[f]) & set(estimated[f])) / len(set(counted[f]) | set(estimated[f])) for f in both]
    assert np.mean(overlap) > 0.3


def test_a_library_is_the_same_however_small_the_blocks_it_is_made_by(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, settings = tmp_path / "whole", BuildSettings(common=8)
    shutil.copytree(corpus.bundle, whole)
    build_library(corpus.directory, whole, settings)
    monkeypatch.setattr(measure, "_ROWS", 64)
    monkeypatch.setattr(measure, "_HELD", 2000)
    monkeypatch.setattr(writing, "_CHOSEN_AT_ONCE", 7)
    build_library(corpus.directory, corpus.bundle, settings)
    assert _dump(corpus.bundle) == _dump(whole)


def test_a_bundle_with_its_new_library_is_served(corpus: Corpus) -> None:
    build_library(corpus.directory, corpus.bundle, BuildSettings())
    bundle = Bundle.open(corpus.bundle)
    store = Store(bundle.part("library").path / "library.sqlite", corpus.bundle / "labels.sqlite")
    assert store.meta["sae_revision"] == bundle.part("sae").revision
    assert store.examples(int(np.argmax((dense_features(corpus) > 0).sum(0))), 0, 100)[1] > 5


KILLED = """
import sys, time
from pathlib import Path
import faceteer_trainer.library.activations as activations
from faceteer_trainer.__main__ import main
write = activations.ActivationStore.write
def slowly(self, first, active):
    write(self, first, active)
    print("wrote", first, flush=True)
    time.sleep(30)
activations.ActivationStore.write = slowly
main(["build-library", "--corpus", sys.argv[1], "--bundle", sys.argv[2]])
"""


def test_a_killed_build_goes_on_and_gives_the_same_library(corpus: Corpus, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(corpus.bundle, whole)
    build_library(corpus.directory, whole, BuildSettings())
    before = (corpus.bundle / "bundle.json").read_bytes()
    command = [sys.executable, "-c", KILLED, corpus.directory, corpus.bundle]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "wrote 0\n"
        process.send_signal(signal.SIGKILL)
    # Nothing has changed for whoever serves the bundle.
    assert (corpus.bundle / "bundle.json").read_bytes() == before
    verify(corpus.bundle)
    began = time.time()
    build_library(corpus.directory, corpus.bundle, BuildSettings())
    assert time.time() - began < 60
    assert _dump(corpus.bundle) == _dump(whole)
    statistics = "sae/feature_statistics.safetensors"
    assert (corpus.bundle / statistics).read_bytes() == (whole / statistics).read_bytes()


def _dump(bundle: Path) -> list[object]:
    import sqlite3

    with sqlite3.connect(bundle / "library" / "library.sqlite") as connection:
        tables = ("features", "examples", "relatives", "thumbnails")
        return [connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2, 3").fetchall() for table in tables[:3]]


def test_what_does_not_fit_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_corpus(other, corpus.embeds, "0123456789abcdef")
    with pytest.raises(JobError, match=r"embeddings of encoder 0123456789abcdef, but \w+ is needed"):
        build_library(other, corpus.bundle, BuildSettings())
    revision = Bundle.open(corpus.bundle).part("encoder").revision
    broken = tmp_path / "broken"
    write_corpus(broken, corpus.embeds, revision)
    shard = broken / "embeds-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    shard.write_bytes(data)
    with pytest.raises(JobError, match=r"embeds-00001\.safetensors: row 249 holds NaN"):
        build_library(broken, corpus.bundle, BuildSettings())
    shard.write_bytes(data[:-100])
    with pytest.raises(JobError, match="cut short"):
        build_library(broken, corpus.bundle, BuildSettings())
    with pytest.raises(JobError, match="no embedding corpus"):
        build_library(tmp_path, corpus.bundle, BuildSettings())
    with pytest.raises(BundleError, match="no bundle here"):
        build_library(corpus.directory, tmp_path, BuildSettings())
    loud = tmp_path / "loud"
    write_corpus(loud, corpus.embeds, revision)
    card = json.loads((loud / "corpus.json").read_text())
    (loud / "corpus.json").write_text(json.dumps(card | {"complete": False}))
    with pytest.raises(JobError, match="has not finished"):
        EmbeddingCorpus.open(loud)


def test_two_builds_of_one_bundle_keep_out_of_each_others_way(corpus: Corpus) -> None:
    with (
        locked(corpus.bundle / ".build-library"),
        pytest.raises(JobError, match=rf"another run \(process {os.getpid()}\) works in it"),
    ):
        build_library(corpus.directory, corpus.bundle, BuildSettings())


def test_an_error_is_a_sentence_on_the_command_line(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["build-library", "--corpus", str(corpus.bundle), "--bundle", str(corpus.bundle)])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: ")
