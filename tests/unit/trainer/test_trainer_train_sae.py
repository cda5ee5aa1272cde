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
from faceteer_postcards.synthetic import SparseMixtures
from faceteer_sae.model import SparseAutoencoder
from faceteer_trainer.__main__ import main
from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.files import locked
from faceteer_trainer.sae.architectures import ARCHITECTURES
from faceteer_trainer.sae.outputs import measure
from faceteer_trainer.sae.recovery import recovered
from faceteer_trainer.sae.statistics import measure_features
from faceteer_trainer.sae.trainer import CHECKPOINT, Loss, Settings, Trainer
from faceteer_trainer.training import Budget
from safetensors.torch import load_file

MADE_UP = SparseMixtures(64, 24, mean_active=4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("synthetic")
    MADE_UP.write(directory, 8192, "float32", shard_size=4096)
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
    pairs, acts = trainer.model.fire(torch.from_numpy(x) / trainer.scale, 4)
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
    assert report["encoder_revision"] == MADE_UP.encoder_revision
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
    ours = measure(trainer.model, trainer.corpus, trainer.scale, 4, 8192)
    x = trainer.corpus.rows(np.arange(8192))
    pairs, acts = trainer.model.fire(torch.from_numpy(x) / trainer.scale, 4)
    whole = torch.zeros(8192, 96).index_put(tuple(pairs), acts * trainer.scale)
    expected = measure_features(whole)
    torch.testing.assert_close(ours.statistics.firing_share, expected.firing_share)
    torch.testing.assert_close(ours.statistics.p99, expected.p99, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.statistics.rivals_offsets, expected.rivals_offsets)
    assert torch.equal(ours.statistics.rivals_indices, expected.rivals_indices)
    x_hat = whole @ trainer.model.W_dec.detach() + trainer.model.b_dec.detach() * trainer.scale
    raw = torch.from_numpy(x)
    unexplained = (raw - x_hat).square().sum() / (raw - raw.mean(0)).square().sum()
    assert ours.figures["explained_variance"] == pytest.approx(1 - unexplained.item(), abs=1e-4)


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
def test_a_killed_run_goes_on_to_the_identical_weights(corpus: Path, tmp_path: Path, kernels: str) -> None:
    more = ("--architecture", "topk", "--steps", "300", "--kernels", kernels, "--checkpoint-minutes", "0.004")
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
    MADE_UP.write(tmp_path / "corpus", 8192, "float32", shard_size=4096)
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


def test_the_postcards_recipe_runs_on_any_small_corpus(corpus: Path, tmp_path: Path) -> None:
    out = _run(corpus, tmp_path, "--recipe", "postcards", "--steps", "20")
    assert SparseAutoencoder.load(out).architecture == "batchtopk"
    assert json.loads((out / "training.json").read_text())["recipe"] == "postcards"


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
        shares.append(measure(trainer.model, trainer.corpus, trainer.scale, 2, 8192).figures["dead_share"])
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
