"""A library from embeddings: every figure against an exact reckoning, and a build that can be stopped at any time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from faceteer_library.editor import LibraryEditor
from faceteer_library.store import Store
from faceteer_runtime.bundle import Bundle, BundleError, verify
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.statistics import load_statistics
from faceteer_sae.weights import SaeWeights, write_weights
from faceteer_trainer.__main__ import main
from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.errors import JobError
from faceteer_trainer.files import locked
from faceteer_trainer.library.activations import ActivationStore
from faceteer_trainer.library.encoding import Active, BulkEncoder
from faceteer_trainer.library.measure import BuildSettings
from faceteer_trainer.library.related import coactivating_common, nearest
from faceteer_trainer.library.run import build_library
from faceteer_trainer.library.tallies import Pairs, Spread, Table, lottery
from faceteer_trainer.library.writing import from_quantiles, strongest
from tiny_bundle import N_FEATURES
from tiny_corpus import ROWS, Corpus, D, dense_features, make_corpus, write_corpus


def sparse_of(dense: np.ndarray) -> Active:
    rows, columns = np.nonzero(dense)
    indptr = np.concatenate([[0], np.cumsum((dense > 0).sum(1))]).astype(np.int64)
    return Active(indptr, columns.astype(np.int32), dense[rows, columns].astype(np.float32))


def random_acts(rows: int = 400, features: int = 20, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    acts = rng.lognormal(0, 1.5, (rows, features)) * (rng.random((rows, features)) < np.linspace(0.002, 0.6, features))
    return acts.astype(np.float32)


# -- the parts -------------------------------------------------------------------------------------


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


def test_nearest_directions_are_those_of_a_plain_reckoning() -> None:
    from faceteer_sae.rows import Rows

    rows = torch.randn(700, 16, generator=torch.Generator().manual_seed(5))
    wanted = np.flatnonzero(np.arange(700) % 3 > 0)
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


# -- the whole -------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tiny_bundle: Path, tmp_path: Path) -> Corpus:
    return make_corpus(tiny_bundle, tmp_path)


def test_the_library_says_what_a_plain_reckoning_says(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
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
    strong = (acts > 0.3 * statistics.p99).astype(np.float64)
    share, together = strong.mean(0), strong.T @ strong
    chance = len(acts) * np.outer(share, share)
    expected = (together < 0.1 * chance) & (chance >= 20) & (share >= 0.01) & (share[:, None] >= 0.01)
    np.fill_diagonal(expected, False)
    assert expected.any()
    for feature in range(N_FEATURES):
        assert statistics.rivals(feature).tolist() == np.flatnonzero(expected[feature]).tolist()


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
