"""train-sae as a user runs it: what it leaves is served, a killed run goes on, bad input is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from faceteer_postcards.synthetic import SparseMixtures, recovered
from faceteer_sae.model import SparseAutoencoder
from faceteer_trainer.__main__ import main
from faceteer_trainer.budget import Budget
from faceteer_trainer.corpus.shards import CorpusCard, EmbeddingCorpus, Shard, shard_name, write_embeds
from faceteer_trainer.files import locked
from faceteer_trainer.sae.autoencoder import Autoencoder
from faceteer_trainer.sae.initial_directions import neighbour_directions, skewed_directions
from faceteer_trainer.sae.statistics import measure
from faceteer_trainer.sae.trainer import ARCHITECTURES, CHECKPOINT, Loss, Settings, Trainer
from safetensors.torch import load_file

MIXTURES = SparseMixtures(64, 24, mean_active=4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("synthetic")
    MIXTURES.write(directory, 8192, "float32", shard_size=4096)
    return directory


def _words(corpus: Path, out: Path, *more: str) -> list[str]:
    words = ["train-sae", "--corpus", str(corpus), "--out", str(out), "--d-sae", "96", "--k", "4", "--batch", "64"]
    return [*words, "--log-every", "100", *more]


def _run(corpus: Path, out: Path, *more: str) -> Path:
    main(_words(corpus, out, *more))
    return out


def _refused(capsys: pytest.CaptureFixture[str], run: Callable[[], object]) -> str:
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 1
    return capsys.readouterr().err


def _trainer(corpus: Path, out: Path, **settings: object) -> Trainer:
    out.mkdir(exist_ok=True)
    values = {"loss": Loss(k=4), "budget": Budget(steps=20), "batch": 64} | settings
    return Trainer(EmbeddingCorpus.open(corpus), out, Settings("topk", 96, **values))  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_service_serves_what_was_trained_with_the_trainers_own_activations(
    corpus: Path, tmp_path: Path, architecture: str
) -> None:
    out = _run(corpus, tmp_path, "--architecture", architecture, "--steps", "60")
    served = SparseAutoencoder.load(out)
    assert served.architecture == ("batchtopk" if architecture == "matryoshka" else architecture)
    trainer = Trainer(EmbeddingCorpus.open(corpus), out, _settings(out))
    x = trainer.corpus.rows(np.arange(50))
    pairs, acts = trainer.model.fire(torch.from_numpy(x) / trainer.scale)
    ours = torch.zeros(50, 96).index_put(tuple(pairs), acts * trainer.scale).numpy()
    assert np.abs(ours).max() > 1
    for row, found in zip(ours, served.encode(x), strict=True):
        theirs = np.zeros(96, np.float32)
        theirs[found.top_indices] = found.top_acts
        np.testing.assert_allclose(theirs, row, rtol=1e-5, atol=1e-5 * np.abs(ours).max())
    card = json.loads((out / "cfg.json").read_text())
    assert set(card["metadata"]["embedding_statistics"]) == {"norm", "l0"}
    assert card["metadata"]["embedding_statistics"]["norm"]["p50"] == pytest.approx(40, rel=0.3)
    report = json.loads((out / "training.json").read_text())
    assert report["encoder_revision"] == MIXTURES.encoder_revision
    assert report["figures"]["rows"] == 8192
    assert list((out / "tensorboard").glob("events.*"))
    statistics = load_file(out / "feature_statistics.safetensors")
    assert statistics["firing_share"].sum().item() == pytest.approx(report["figures"]["l0"], rel=1e-4)


def _settings(out: Path) -> Settings:
    values = json.loads((out / "training.json").read_text())["settings"]
    loss = {name: values.pop(name) for name in Loss.__dataclass_fields__}
    loss["prefixes"] = tuple(loss["prefixes"])
    budget = {name: values.pop(name) for name in ("steps", "minutes")}
    return Settings(**values, loss=Loss(**loss), budget=Budget(**budget))


def test_statistics_gathered_in_a_stream_are_those_of_whole_matrices(corpus: Path, tmp_path: Path) -> None:
    trainer = _trainer(corpus, tmp_path / "out", budget=Budget(steps=200), rate=5e-3)
    trainer.train()
    model = Autoencoder(trainer.model.weights(trainer.scale))
    ours = measure(model, trainer.corpus, 8192)
    x = trainer.corpus.rows(np.arange(8192))
    acts = model.encode(torch.from_numpy(x))
    f = acts.numpy().astype(np.float64)
    fires, statistics = f > 0, ours.statistics
    np.testing.assert_allclose(statistics.firing_share, fires.mean(0), rtol=1e-6)
    p99 = [np.quantile(column[on], 0.99) if on.any() else 0.0 for column, on in zip(f.T, fires.T, strict=True)]
    np.testing.assert_allclose(statistics.p99, p99, rtol=1e-5, atol=1e-5)
    strong = (f > 0.3 * statistics.p99).astype(np.float64)
    share, together = strong.mean(0), strong.T @ strong
    chance = len(x) * np.outer(share, share)
    rivals = (together < 0.1 * chance) & (chance >= 20) & (np.minimum.outer(share, share) >= 0.01)
    np.fill_diagonal(rivals, False)
    assert rivals.any()
    assert np.array_equal(np.diff(statistics.rivals_offsets), rivals.sum(1))
    assert np.array_equal(statistics.rivals_indices, rivals.nonzero()[1])
    np.testing.assert_allclose(statistics.embedding_mean, x.mean(0), rtol=1e-4, atol=1e-4)
    x_hat = model.decode(acts).numpy()
    unexplained = np.square(x - x_hat).sum() / np.square(x - x.mean(0)).sum()
    assert ours.figures["explained_variance"] == pytest.approx(1 - unexplained, abs=1e-4)


@pytest.mark.parametrize(
    ("kernels", "options"),
    [
        ("sparse", ("--architecture", "topk")),
        ("dense", ("--architecture", "topk")),
        (
            "sparse",
            ("--start", "skewed", "--start-k", "8", "--reset-every", "7", "--dead-after", "500", "--hold-b-dec"),
        ),
    ],
)
def test_a_killed_run_goes_on_to_the_identical_weights(
    corpus: Path, tmp_path: Path, kernels: str, options: tuple[str, ...]
) -> None:
    more = (*options, "--steps", "300", "--kernels", kernels, "--checkpoint-minutes", "0.004")
    whole = _run(corpus, tmp_path / "whole", *more)
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "faceteer_trainer", *_words(corpus, killed, *more)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (killed / CHECKPOINT).exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    step = torch.load(killed / CHECKPOINT, weights_only=True)["step"]
    assert 0 < step < 300
    _run(corpus, killed, *more)
    assert (whole / "sae_weights.safetensors").read_bytes() == (killed / "sae_weights.safetensors").read_bytes()


def test_a_run_is_not_resumed_with_other_settings_or_on_another_corpus(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = _run(corpus, tmp_path / "out", "--steps", "5")
    before = (out / "sae_weights.safetensors").read_bytes()
    said = _refused(capsys, lambda: _run(corpus, out, "--steps", "5", "--lr", "0.5"))
    assert "rate was 0.001 and is 0.5" in said
    assert "another --out" in said
    SparseMixtures(64, 24, mean_active=4, seed=1).write(tmp_path / "other", 4096)
    assert "another corpus" in _refused(capsys, lambda: _run(tmp_path / "other", out, "--steps", "5"))
    assert (out / "sae_weights.safetensors").read_bytes() == before


def test_two_runs_in_one_folder_are_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path):
        assert "another run" in _refused(capsys, lambda: _run(corpus, tmp_path, "--steps", "5"))


def test_a_row_of_nan_is_refused_by_shard_and_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MIXTURES.write(tmp_path / "corpus", 8192, "float32", shard_size=4096)
    with (tmp_path / "corpus" / "embeds-00001.safetensors").open("r+b") as file:
        file.seek(-24 * 4, os.SEEK_END)
        file.write(np.full(24, np.nan, np.float32).tobytes())
    said = _refused(capsys, lambda: _run(tmp_path / "corpus", tmp_path / "out", "--steps", "200"))
    assert "embeds-00001.safetensors: row 4095 holds NaN" in said


def test_a_full_disk_is_one_clear_sentence_and_the_old_checkpoint_stays(corpus: Path, tmp_path: Path) -> None:
    trainer = _trainer(corpus, tmp_path / "out")
    trainer.save()
    size = (tmp_path / "out" / CHECKPOINT).stat().st_size
    code = (
        "import resource, sys, torch; from pathlib import Path;"
        "from faceteer_trainer.corpus.shards import EmbeddingCorpus;"
        "from faceteer_trainer.sae.trainer import *;"
        "c = EmbeddingCorpus.open(sys.argv[1]);"
        "t = Trainer(c, Path(sys.argv[2]), Settings('topk', 96, Loss(k=4), Budget(steps=20), batch=64));"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}));"
        "\ntry: t.save()\nexcept JobError as error: print('refused:', error)"
    )
    before = (tmp_path / "out" / CHECKPOINT).read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", code, str(corpus), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.stdout.startswith("refused:"), done.stderr
    assert "make room" in done.stdout
    assert (tmp_path / "out" / CHECKPOINT).read_bytes() == before
    assert not list((tmp_path / "out").glob("*.part"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--k", "97"), "--k is 97, but --d-sae is 96"),
        (("--kernels", "sparse", "--architecture", "standard"), "--kernels sparse does not go with standard"),
        (("--lr", "0"), "--lr is 0.0"),
        (("--steps", "5", "--minutes", "1"), "--steps and --minutes"),
        (("--decay", "2"), "--decay is 2.0"),
        (("--start-k", "3"), "--start-k is 3.0; it must be 4 (--k) to 96 (--d-sae)"),
        (("--start-k", "97"), "--start-k is 97.0"),
        (("--anneal", "0"), "--anneal is 0.0"),
        (("--anneal", "1.5"), "--anneal is 1.5"),
        (("--reset-every", "-1"), "--reset-every is -1"),
        (("--start", "skewed", "--architecture", "standard"), "--start does not go with standard"),
        (("--reset-every", "5", "--architecture", "standard"), "--reset-every does not go with standard"),
        (("--device", "cuda:7"), "no CUDA GPU"),
    ],
)
def test_options_that_make_no_sense_are_named(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    if "--device" in more and torch.cuda.is_available():
        pytest.skip("has a GPU")
    assert said in _refused(capsys, lambda: _run(corpus, tmp_path, *more))
    assert not (tmp_path / "cfg.json").exists()


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
def test_bfloat16_trains_to_nearly_the_fit_of_float32(corpus: Path, tmp_path: Path, kernels: str) -> None:
    more = ("--architecture", "topk", "--steps", "150", "--lr", "0.005", "--warmup", "20", "--kernels", kernels)
    found = [
        json.loads((_run(corpus, tmp_path / name, *more, *flag) / "training.json").read_text())["figures"]
        for name, flag in (("float32", ()), ("bfloat16", ("--bf16",)))
    ]
    assert found[0]["explained_variance"] > 0.4
    assert found[1]["explained_variance"] == pytest.approx(found[0]["explained_variance"], abs=0.03)


def test_a_budget_in_minutes_ends_in_time(corpus: Path, tmp_path: Path) -> None:
    out = _run(corpus, tmp_path, "--minutes", "0.01")
    report = json.loads((out / "training.json").read_text())
    assert 0.5 < report["seconds"] < 3
    assert report["steps"] > 0


def test_decoder_rows_keep_norm_one_and_dead_latents_are_woken(corpus: Path, tmp_path: Path) -> None:
    shares = []
    for aux_k in (0, 32):
        trainer = _trainer(
            corpus, tmp_path / f"aux-{aux_k}", loss=Loss(k=2, aux_k=aux_k), budget=Budget(steps=250), rate=5e-3,
            dead_after=1500, kernels="sparse",
        )  # fmt: skip
        with torch.no_grad():
            trainer.model.b_enc[48:] = -0.3  # half of the latents start out of reach of the k strongest
        trainer.train()
        torch.testing.assert_close(trainer.model.W_dec.norm(dim=-1), torch.ones(96))
        model = Autoencoder(trainer.model.weights(trainer.scale))
        shares.append(measure(model, trainer.corpus, 8192).figures["dead_share"])
    assert shares[1] < 0.5 * shares[0]


def test_a_trained_decoder_finds_the_true_directions_and_a_frozen_one_does_not(tmp_path: Path) -> None:
    mixtures = SparseMixtures(128, 32, mean_active=4)
    mixtures.write(tmp_path / "corpus", 32768)
    truth = torch.from_numpy(mixtures.dictionary)
    found = {}
    for name, train_decoder in (("trained", True), ("frozen", False)):
        trainer = _trainer(
            tmp_path / "corpus", tmp_path / name, loss=Loss(k=4), budget=Budget(steps=600), batch=256, rate=1e-2,
            kernels="sparse", train_decoder=train_decoder,
        )  # fmt: skip
        trainer.train()
        found[name] = recovered(trainer.model.W_dec.detach(), truth).mean
    chance = recovered(torch.randn(96, 32, generator=torch.Generator().manual_seed(9)), truth).mean
    assert found["trained"] > found["frozen"] + 0.15, found
    assert found["trained"] > chance + 0.15, (found, chance)


# -- what a run may start from, anneal and reset ------------------------------------------------------


def _simple_world(directory: Path, count: int = 4000) -> tuple[EmbeddingCorpus, torch.Tensor]:
    """Sums of one direction of each of three kinds, in a corpus, and the kinds' values [count, 3] of four."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q[:12].view(3, 4, 24)
    values = torch.randint(4, (count, 3), generator=generator)
    x = 5 * sum(directions[kind, values[:, kind]] for kind in range(3))
    x = x + 0.02 * torch.randn(count, 24, generator=generator)
    directory.mkdir()
    write_embeds(directory / shard_name(0), x.numpy(), dtype="float32", encoder_revision="r")
    CorpusCard("simple", "r", 24, "float32", (Shard(shard_name(0), count),)).write(directory)
    return EmbeddingCorpus.open(directory), values


def test_skewed_directions_are_the_single_features(tmp_path: Path) -> None:
    corpus, values = _simple_world(tmp_path / "corpus")
    x = torch.from_numpy(corpus.rows(np.arange(4000)))
    found = skewed_directions(x, 24, tries=96, rounds=100)
    projections = (x - x.mean(0)) @ found.encoder.T
    assert (found.skewness.diff() <= 0).all()
    for kind in range(3):
        for value in range(4):
            truth = (values[:, kind] == value).float()
            correlation = torch.corrcoef(torch.cat([truth[None], projections.T]))[0, 1:]
            assert correlation.max() > 0.98
    # The encoder's projections are in units of the decoder's directions: together they give the embeddings back.
    mine = projections[:, 0]
    assert float((mine @ ((x - x.mean(0)) @ found.decoder[0])) / (mine @ mine)) == pytest.approx(1, abs=0.05)


def test_neighbours_differ_in_one_kind_so_their_differences_are_single_features(tmp_path: Path) -> None:
    corpus, values = _simple_world(tmp_path / "corpus")
    x, values = torch.from_numpy(corpus.rows(np.arange(300))), values[:300]
    # Each of 64 combinations is there about five times: the tenth neighbour is the first of another one.
    found = neighbour_directions(x, 12, rank=10)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(12))
    assert (found @ found.T).fill_diagonal_(0).max() < 0.6  # each is far from all others
    shares = []
    for kind in range(3):
        means = torch.stack([x[values[:, kind] == value].mean(0) for value in range(4)]) - x.mean(0)
        shares.append((found @ torch.linalg.svd(means).Vh[:3].T).square().sum(-1))
    assert torch.stack(shares).amax(0).min() > 0.9
    few = neighbour_directions(x[:8], 40, rank=3)
    torch.testing.assert_close(few.norm(dim=-1), torch.ones(40))


@pytest.mark.parametrize("kernels", ["dense", "sparse"])
def test_an_sae_that_starts_at_skewed_directions_finds_the_features_of_a_simple_world(
    tmp_path: Path, kernels: str
) -> None:
    corpus, values = _simple_world(tmp_path / "corpus")
    (tmp_path / "out").mkdir()
    settings = Settings(
        "matryoshka", 48, Loss(k=4, aux_k=16, prefixes=(0.5, 1.0)), Budget(steps=600), batch=256, decay=1.0,
        train_b_dec=False, start="skewed", start_k=5, reset_every=100, dead_after=12_800, kernels=kernels,
    )  # fmt: skip
    trainer = Trainer(corpus, tmp_path / "out", settings)
    trainer.train()
    figures = trainer.write(tmp_path / "out", 4000, "float16", {})
    assert figures["explained_variance"] > 0.99
    sae = Autoencoder.load(tmp_path / "out")
    x = torch.from_numpy(corpus.rows(np.arange(4000)))
    np.testing.assert_allclose(sae.b_dec.detach().numpy(), x.numpy().mean(0), atol=2e-3)  # held at the mean
    fires = sae.encode(x) > 0
    for kind in range(3):
        for value in range(4):
            truth = values[:, kind] == value
            assert (fires == truth[:, None]).float().mean(0).max() > 0.97


def test_k_falls_from_its_start_to_its_end_over_the_annealed_share() -> None:
    settings = Settings("batchtopk", 96, Loss(k=4), start_k=12, anneal=0.5)
    assert [settings.k(share) for share in (0.0, 0.25, 0.5, 1.0)] == [12, 8, 4, 4]
    assert Settings("batchtopk", 96, Loss(k=4)).k(0.0) == 4


def test_a_falling_k_is_what_fires(corpus: Path, tmp_path: Path) -> None:
    settings = Settings(
        "batchtopk", 96, Loss(k=4), Budget(steps=8), batch=64, start_k=12, anneal=0.5, kernels="sparse"
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    trainer, l0 = Trainer(EmbeddingCorpus.open(corpus), tmp_path / "out", settings), []
    trainer.train(watch=lambda step, losses, figures: l0.append(losses.l0))
    assert l0 == [12, 10, 8, 6, 4, 4, 4, 4]
    assert trainer.model.k == 4


def test_dead_latents_are_reset_after_the_anneal_and_until_three_quarters_of_the_budget() -> None:
    settings = Settings("topk", 96, reset_every=10, anneal=0.25)
    assert settings.resets(20, 0.5)
    assert not settings.resets(21, 0.5)
    assert not settings.resets(20, 0.25)
    assert not settings.resets(20, 0.75)
    assert not Settings("topk", 96).resets(20, 0.5)


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
def test_a_reset_points_dead_latents_at_the_worst_reconstructed_rows(
    corpus: Path, tmp_path: Path, kernels: str
) -> None:
    trainer = _trainer(corpus, tmp_path / "out", kernels=kernels, rate=1e-2)
    for _ in range(3):
        trainer.one_step(1e-2)
        trainer.step += 1
    x = trainer.units(np.arange(64))
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(64, 24, generator=generator)
    residual[[7, 30]] *= torch.tensor([[10.0], [20.0]])
    dead = torch.zeros(96, dtype=torch.bool)
    dead[[5, 80]] = True
    before = trainer.model.W_dec.detach().clone()
    trainer.silent[:] = 9
    with torch.no_grad():
        trainer._reset(dead, x, residual)
    W_dec, W_enc = trainer.model.W_dec.detach(), trainer.model.W_enc.detach()
    expected = torch.nn.functional.normalize(residual[[30, 7]], dim=-1)
    torch.testing.assert_close(W_dec[[5, 80]], expected)
    assert torch.equal(W_enc[[5, 80]], W_dec[[5, 80]])
    assert torch.equal(W_dec[~dead], before[~dead])
    fires = (trainer.model.centred(x) @ W_enc.T + trainer.model.b_enc)[:, [5, 80]] > 1e-6
    assert fires.sum(0).tolist() == [2, 2]  # three in a hundred of 64
    assert trainer.silent[dead].tolist() == [0, 0]
    assert (trainer.silent[~dead] == 9).all()
    state = trainer.optimizer.state
    for name in ("W_enc", "W_dec", "b_enc"):
        held = state[name] if kernels == "sparse" else state[getattr(trainer.model, name)]
        assert not held["exp_avg"][dead].any()
        assert not held["exp_avg_sq"][dead].any()
        assert held["exp_avg"][~dead].any()
    if kernels == "sparse":
        assert state["W_enc"]["steps"][dead].tolist() == [0, 0]
