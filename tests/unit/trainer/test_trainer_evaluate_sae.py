"""evaluate-sae: figures one can do by hand, the same from whole dense matrices, and the job as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from faceteer_postcards.evaluation.metrics import monosemanticity
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.weights import SaeWeights, write_weights
from faceteer_trainer.__main__ import main
from faceteer_trainer.corpus.shards import CorpusCard, EmbeddingCorpus, Shard, write_embeds
from faceteer_trainer.sae import autoencoder, comparison
from faceteer_trainer.sae.autoencoder import Autoencoder
from faceteer_trainer.sae.comparison import Evaluation, evaluate
from safetensors.torch import save_file

ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")


def write_sae(
    directory: Path, architecture: str, tensors: dict[str, torch.Tensor], k: int = 4, **metadata: Any
) -> Path:
    """An SAE as SAELens lays it out; W_enc [d_in, d_sae]."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "sae_weights.safetensors")
    d_in, d_sae = tensors["W_enc"].shape
    card: dict[str, Any] = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "metadata": metadata}
    card["apply_b_dec_to_input"] = architecture != "standard"
    if "topk" in architecture:
        card["k"] = k
    (directory / "cfg.json").write_text(json.dumps(card))
    return directory


def random_sae(directory: Path, architecture: str, d_in: int = 12, d_sae: int = 40, **metadata: Any) -> Path:
    """Random weights; half the features of which fire on a picture where nothing keeps them from it."""
    draw = torch.Generator().manual_seed(ARCHITECTURES.index(architecture))
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=draw), dim=1)
    tensors = {"W_enc": W_dec.T, "b_enc": torch.randn(d_sae, generator=draw) * 0.1, "W_dec": W_dec * 0.3,
               "b_dec": torch.randn(d_in, generator=draw)}  # fmt: skip
    tensors["b_enc"][5] = -1000.0  # never fires
    if architecture == "jumprelu":
        tensors["threshold"] = torch.rand(d_sae, generator=draw) * 2
    elif architecture == "batchtopk":
        tensors["topk_threshold"] = torch.tensor(1.5)
    return write_sae(directory, architecture, tensors, **metadata)


def write_corpus(directory: Path, values: np.ndarray, revision: str = "r1", names: list[str] | None = None) -> Path:
    """A corpus of one shard."""
    directory.mkdir(parents=True)
    write_embeds(directory / "embeds-00000.safetensors", values, dtype="float32", encoder_revision=revision)
    pictures = None
    if names is not None:
        pictures = "pictures-00000.parquet"
        rows = {"name": names, "caption": [""] * len(names), "thumbnail": [b""] * len(names)}
        pq.write_table(pa.table(rows), directory / pictures)
    shard = Shard("embeds-00000.safetensors", len(values), pictures)
    CorpusCard("pictures", revision, values.shape[1], "float32", (shard,)).write(directory)
    return directory


def literal(directory: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Activations [m, d_sae] and reconstructions [m, d_in] by the SAE that services use, a picture at a time."""
    sae = SparseAutoencoder.load(directory)
    found = sae.encode(x)
    acts = np.zeros((len(x), sae.d_sae), np.float32)
    for row, features in zip(acts, found, strict=True):
        row[features.top_indices] = features.top_acts
    return acts, np.stack([sae.decode(f.top_indices, f.top_acts) for f in found])


def measured(directory: Path, x: np.ndarray, **options: Any) -> Evaluation:
    return evaluate(Autoencoder.load(directory), lambda rows: x[rows], np.arange(len(x)), **options)


def test_figures_of_two_pictures_and_three_features_are_those_done_by_hand(tmp_path: Path) -> None:
    # Features read the two axes and nothing; the decoder gives back half of the first axis and all of the second.
    tensors = {"W_enc": torch.tensor([[1.0, 0, 0], [0, 1, 0]]), "b_enc": torch.tensor([0.0, -1, -1]),
               "W_dec": torch.tensor([[0.5, 0], [0, 1], [1, 1]]), "b_dec": torch.zeros(2)}  # fmt: skip
    x = np.array([[4, 0], [0, 3]], np.float32)
    # f = [[4, 0, 0], [0, 2, 0]]; x_hat = [[2, 0], [0, 2]]; errors 4 and 1; mean (2, 1.5); distances 6.25 each.
    found = measured(write_sae(tmp_path / "sae", "standard", tensors), x)
    fit = found.reconstruction
    assert fit.explained_variance == pytest.approx(1 - 5 / 12.5)
    assert (fit.mse, fit.mse_of_zero, fit.mse_of_mean) == pytest.approx((5 / 4, 25 / 4, 12.5 / 4))
    assert fit.cosine == pytest.approx(1.0)
    np.testing.assert_array_equal(found.l0, [1, 1])
    np.testing.assert_array_equal(found.firing_share, [0.5, 0.5, 0])
    assert found.dead_share == pytest.approx(1 / 3)
    assert found.as_dict(2)["recovered_from_zero"] == pytest.approx(1 - 5 / 25)
    histogram = found.density_histogram()
    assert histogram["never"] == 1
    # log10 of a half is -0.3: the last bin, of half a power of ten.
    assert histogram["counts"] == [0] * (len(histogram["edges"]) - 2) + [2]


def test_monosemanticity_of_three_pictures_is_that_done_by_hand(tmp_path: Path) -> None:
    tensors = {"W_enc": torch.eye(2), "b_enc": torch.zeros(2), "W_dec": torch.eye(2), "b_dec": torch.zeros(2)}
    x = np.array([[1, 0], [2, 0], [1, 1]], np.float32)
    judge = np.array([[5, 0], [3, 4], [0, 2]], np.float32)  # cosines: 0.6 of the first two, 0 and 0.8 with the third
    found = measured(
        write_sae(tmp_path / "sae", "standard", tensors), x, judge=lambda rows: judge[rows], judged_rows=3
    ).monosemanticity  # fmt: skip
    assert found is not None
    # Feature 0 fires with 1, 2 and 1: pairs weigh 2, 1 and 2; feature 1 fires once, so that it has no pair.
    assert found.scores[0] == pytest.approx((2 * 0.6 + 1 * 0 + 2 * 0.8) / 5)
    assert np.isnan(found.scores[1])
    assert found.chance == pytest.approx((0.6 + 0 + 0.8) / 3)
    np.testing.assert_array_equal(found.fired, [3, 1])


@pytest.mark.parametrize("sparse", [0.0, 2.0], ids=["matrices", "pairs"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_figures_follow_from_the_served_sae_and_whole_matrices(
    tmp_path: Path, architecture: str, sparse: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small blocks, so that borders of rows and features are met; both ways to sum what fires.
    monkeypatch.setattr(comparison, "ROWS", 16)
    monkeypatch.setattr(autoencoder, "FEATURES", 7)
    monkeypatch.setattr(comparison, "_SPARSE", sparse)
    directory = random_sae(tmp_path / "sae", architecture)
    x = np.random.default_rng(1).standard_normal((50, 12)).astype(np.float32) * 3 + 1
    judge = np.random.default_rng(2).standard_normal((50, 5)).astype(np.float32) + 0.5
    found = measured(directory, x, judge=lambda rows: judge[rows], judged_rows=37)
    acts, x_hat = literal(directory, x)
    wide, output = x.astype(np.float64), x_hat.astype(np.float64)
    fit = found.reconstruction
    assert fit.explained_variance == pytest.approx(
        1 - ((wide - output) ** 2).sum() / ((wide - wide.mean(0)) ** 2).sum(), abs=1e-6
    )
    assert fit.mse == pytest.approx(((wide - output) ** 2).mean(), rel=1e-5)
    assert fit.mse_of_zero == pytest.approx((wide**2).mean(), rel=1e-6)
    assert fit.mse_of_mean == pytest.approx(wide.var(0).mean(), rel=1e-6)
    norms = np.linalg.norm(wide, axis=1) * np.linalg.norm(output, axis=1)
    assert fit.cosine == pytest.approx(((wide * output).sum(1) / norms).mean(), abs=1e-6)
    np.testing.assert_array_equal(found.l0, (acts > 0).sum(1))
    np.testing.assert_allclose(found.firing_share, (acts > 0).mean(0))
    assert found.firing_share[5] == 0
    unit = judge[:37].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    ms = found.monosemanticity
    assert ms is not None
    expected = [monosemanticity(column, unit @ unit.T) for column in acts[:37].T.astype(np.float64)]
    np.testing.assert_allclose(ms.scores, expected, atol=1e-5)
    assert ms.chance == pytest.approx((unit @ unit.T)[~np.eye(37, dtype=bool)].mean())


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_an_sae_in_layout_rows_is_measured_with_the_numbers_that_are_served(tmp_path: Path, dtype: str) -> None:
    draw = torch.Generator().manual_seed(9)
    W_enc, W_dec = torch.randn(40, 12, generator=draw), torch.randn(40, 12, generator=draw)
    write_weights(tmp_path, SaeWeights("standard", W_enc, torch.zeros(40), W_dec, torch.ones(12), False), dtype)
    x = np.random.default_rng(1).standard_normal((20, 12)).astype(np.float32)
    found = measured(tmp_path, x)
    acts, x_hat = literal(tmp_path, x)
    np.testing.assert_array_equal(found.l0, (acts > 0).sum(1))
    assert found.reconstruction.mse == pytest.approx(((x - x_hat).astype(np.float64) ** 2).mean(), rel=1e-5)


def test_several_saes_are_put_side_by_side_in_a_table_a_plot_and_json(
    tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    revision = json.loads((tiny_bundle / "bundle.json").read_text())["parts"]["encoder"]["revision"]
    values = np.random.default_rng(3).standard_normal((300, 32)).astype(np.float32) * 2
    corpus = write_corpus(tmp_path / "corpus", values, revision)
    first = random_sae(tmp_path / "relu" / "sae", "standard", 32)
    second = random_sae(tmp_path / "jump", "jumprelu", 32)
    out = tmp_path / "out"
    main(["evaluate-sae", "--corpus", str(corpus), "--sae", str(first), "--sae", str(second), "--bundle",
          str(tiny_bundle), "--rows", "200", "--ms-rows", "150", "--out", str(out)])  # fmt: skip
    shown = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert list(results["saes"]) == ["relu", "jump", "tiny"]
    assert results["rows"] == 200
    assert results["corpus"]["rows"] == 300
    assert results["saes"]["tiny"]["l0"] == pytest.approx(8)
    for name, directory in (("relu", first), ("jump", second), ("tiny", tiny_bundle / "sae")):
        assert name in shown
        figures = results["saes"][name]
        assert f"{figures['explained_variance']:.4f}" in shown
        assert f"| {name} | {figures['architecture']} |" in (out / "comparison.md").read_text()
        assert figures["rows"] == 200
        assert figures["l0_quantiles"]["p05"] <= figures["l0"] <= figures["l0_quantiles"]["p99"]
        counts = figures["firing_density"]
        assert counts["never"] + sum(counts["counts"]) == figures["d_sae"]
        everything = literal(directory, values)[0]
        assert figures["l0"] == pytest.approx((everything > 0).sum(1).mean(), rel=0.2)  # of 200 of the 300 rows
    assert "the SAE's own encoder" in shown.replace("\n", " ")
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    # Again, with every row: the order that rows are taken in does not matter.
    main(["evaluate-sae", "--corpus", str(corpus), "--sae", str(first), "--ms-rows", "0", "--out", str(out)])
    again = json.loads((out / "results.json").read_text())["saes"]["relu"]
    assert again["l0"] == pytest.approx((literal(first, values)[0] > 0).sum(1).mean())
    assert again["monosemanticity"] is None


def test_a_judge_corpus_of_the_same_pictures_says_how_alike_they_are(tmp_path: Path) -> None:
    values = np.random.default_rng(4).standard_normal((60, 12)).astype(np.float32)
    looks = np.random.default_rng(5).standard_normal((60, 3)).astype(np.float32)
    names = [f"{number}.png" for number in range(60)]
    corpus = write_corpus(tmp_path / "corpus", values, names=names)
    sae = random_sae(tmp_path / "sae", "topk", encoder_revision="r1")
    arguments = ["evaluate-sae", "--corpus", str(corpus), "--sae", str(sae), "--out", str(tmp_path / "out")]
    judge = write_corpus(tmp_path / "judge", looks, "dino", names)
    main([*arguments, "--judge-corpus", str(judge), "--ms-least", "2"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "dino" in results["similarity"]
    unit = looks.astype(np.float64) / np.linalg.norm(looks.astype(np.float64), axis=1, keepdims=True)
    acts = literal(sae, values)[0].astype(np.float64)
    with np.errstate(invalid="ignore"):
        scores = np.array([monosemanticity(column, unit @ unit.T) for column in acts.T])
    kept = scores[((acts > 0).sum(0) >= 2) & np.isfinite(scores)]
    (figures,) = results["saes"].values()
    found = figures["monosemanticity"]
    assert found["mean"] == pytest.approx(kept.mean(), abs=1e-5)
    assert found["features"] == len(kept)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate-sae", *arguments])
    assert stopped.value.code == 1
    return capsys.readouterr().err


def test_what_does_not_belong_together_is_refused_with_the_fix(
    tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.random.default_rng(6).standard_normal((20, 12)).astype(np.float32)
    names = [f"{number}.png" for number in range(20)]
    corpus = str(write_corpus(tmp_path / "corpus", values, names=names))
    common = ["--corpus", corpus, "--out", str(tmp_path / "out")]
    sae = ["--sae", str(random_sae(tmp_path / "own", "topk"))]
    assert "give --sae DIR or --bundle DIR" in refused(common, capsys)
    other = random_sae(tmp_path / "other", "topk", encoder_revision="r2")
    assert "of encoder r2" in refused([*common, "--sae", str(other)], capsys)
    wide = random_sae(tmp_path / "wide", "topk", d_in=13)
    assert "13-d embeddings" in refused([*common, "--sae", str(wide)], capsys)
    assert "embed the pictures with that bundle" in refused([*common, "--bundle", str(tiny_bundle)], capsys)
    assert "cfg.json: missing" in refused([*common, "--sae", str(tmp_path)], capsys)
    short = write_corpus(tmp_path / "short", values[:19], names=names[:19])
    assert "19 rows, but the corpus has 20" in refused([*common, *sae, "--judge-corpus", str(short)], capsys)
    swapped = write_corpus(tmp_path / "swapped", values, names=[*names[:-2], names[-1], names[-2]])
    assert "row 18 is of '19.png'" in refused([*common, *sae, "--judge-corpus", str(swapped)], capsys)
    if not torch.cuda.is_available():
        assert "no CUDA GPU" in refused([*common, *sae, "--device", "cuda"], capsys)
    assert not (tmp_path / "out" / "results.json").exists()


def test_rows_are_read_a_thousand_at_a_time_however_many_are_measured(tmp_path: Path) -> None:
    values = np.random.default_rng(7).standard_normal((2500, 12)).astype(np.float32)
    corpus = EmbeddingCorpus.open(write_corpus(tmp_path / "corpus", values))
    seen: list[int] = []

    def embeds(numbers: np.ndarray) -> np.ndarray:
        seen.append(len(numbers))
        return corpus.rows(numbers)

    directory = random_sae(tmp_path / "sae", "batchtopk")
    done: list[int] = []
    found = evaluate(Autoencoder.load(directory), embeds, np.arange(2500), progress=done.append)
    assert seen == [1024, 1024, 452]
    assert done == [1024, 2048, 2500]
    assert found.reconstruction.rows == 2500
    np.testing.assert_array_equal(found.l0, (literal(directory, values)[0] > 0).sum(1))
