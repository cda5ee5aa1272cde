"""The SAE's arithmetic against numbers done by hand and an independent implementation; loading that trusts nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from faceteer_runtime.bundle import BundleError
from faceteer_sae import model
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.weights import SaeConfig, write_weights
from safetensors.torch import save_file
from unit.sae.random_sae import ARCHITECTURES, Pair, embeddings, random_sae, write_sae


def by_hand(architecture: str, k: int = 0, **more: torch.Tensor) -> SparseAutoencoder:
    """Three features in the plane; x = (3, 1) has pre-activations 2*3+1-1 = 6, 1-0.5 = 0.5 and -3."""
    weights = {
        "W_enc": torch.tensor([[2.0, 0.0, -1.0], [1.0, 1.0, 0.0]]),
        "b_enc": torch.tensor([-1.0, -0.5, 0.0]),
        "W_dec": torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]]),
        "b_dec": torch.tensor([10.0, 20.0]),
        **more,
    }
    return SparseAutoencoder(SaeConfig(architecture, 2, 3, k, False, {}), weights)


X = np.array([[3.0, 1.0]], np.float32)


@pytest.mark.parametrize(
    ("sae", "indices", "activations"),
    [
        (by_hand("standard"), [0, 1], [6.0, 0.5]),
        (by_hand("topk", 1), [0], [6.0]),
        (by_hand("topk", 3), [0, 1], [6.0, 0.5]),
        (by_hand("batchtopk", 1, topk_threshold=torch.tensor(0.75)), [0], [6.0]),
        (by_hand("jumprelu", threshold=torch.tensor([7.0, 0.25, 0.0])), [1], [0.5]),
    ],
    ids=["standard", "topk-1", "topk-3", "batchtopk", "jumprelu"],
)
def test_features_are_those_done_by_hand(sae: SparseAutoencoder, indices: list[int], activations: list[float]) -> None:
    (found,) = sae.encode(X)
    assert found.top_indices.tolist() == indices
    assert found.top_acts.tolist() == activations


def test_decoding_is_what_is_done_by_hand() -> None:
    sae = by_hand("standard")
    assert sae.decode(np.array([0, 1]), np.array([6.0, 0.5])).tolist() == [16.0, 21.0]
    assert sae.decode(np.array([], int), np.array([])).tolist() == [10.0, 20.0]


def test_b_dec_is_subtracted_where_the_configuration_says_so() -> None:
    pair = random_sae("standard", apply_b_dec_to_input=True)
    other = random_sae("standard", apply_b_dec_to_input=False)
    x = embeddings(1, 1)
    shifted = x + pair.sae.b_dec
    assert pair.sae.encode(shifted)[0].top_indices.tolist() == other.sae.encode(x)[0].top_indices.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_those_of_a_dense_float64_implementation(architecture: str, dtype: torch.dtype) -> None:
    pair = random_sae(architecture, seed=7, d_in=48, d_sae=700, k=20, dtype=dtype)
    x = embeddings(8, 9, 48)
    for one, found in zip(x, pair.sae.encode(x), strict=True):
        f = pair.dense.encode(one.astype(np.float64))
        assert found.top_indices.tolist() == np.flatnonzero(f).tolist()
        assert np.allclose(found.top_acts, f[f > 0], rtol=1e-4, atol=1e-4)
        x_hat = pair.sae.decode(found.top_indices, found.top_acts)
        assert np.allclose(x_hat, pair.dense.decode(f), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_feature_asked_for_alone_is_the_same_number_as_among_all_in_any_batch(
    architecture: str, dtype: torch.dtype
) -> None:
    pair = random_sae(architecture, seed=5, d_sae=300, dtype=dtype)
    x = embeddings(6, 8)
    together = pair.sae.encode(x)
    for n, found in enumerate(together):
        (alone,) = pair.sae.encode(x[n : n + 1])
        assert alone.top_indices.tolist() == found.top_indices.tolist()
        assert alone.top_acts.tolist() == found.top_acts.tolist()
        everything = np.arange(300)
        single = pair.sae.activations(x[n], everything, found.kth_pre_act)
        assert single.tolist() == found.at(everything).tolist()
        assert pair.sae.activations(x[n], everything[17:18], found.kth_pre_act).tolist() == single[17:18].tolist()


def test_equal_pre_activations_of_topk_fire_together() -> None:
    weights = {
        "W_enc": torch.ones(2, 4),
        "b_enc": torch.tensor([0.0, 1.0, 0.0, -1.0]),
        "W_dec": torch.ones(4, 2),
        "b_dec": torch.zeros(2),
    }
    sae = SparseAutoencoder(SaeConfig("topk", 2, 4, 2, False, {}), weights)
    (found,) = sae.encode(X)
    assert found.top_indices.tolist() == [0, 1, 2]
    assert found.kth_pre_act == 4.0


@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_tiny_and_huge_inputs_neither_vanish_nor_overflow_in_float16(scale: float) -> None:
    pair = random_sae("topk", dtype=torch.float16, apply_b_dec_to_input=False)
    x = embeddings(2, 6) * np.float32(scale)
    for one, found in zip(x, pair.sae.encode(x), strict=True):
        f = pair.dense.encode(one.astype(np.float64))
        assert found.top_indices.tolist() == np.flatnonzero(f).tolist()
        assert np.isfinite(found.top_acts).all()


def test_an_embedding_of_zeros_is_encoded_like_any_other(pair: Pair) -> None:
    x = np.zeros((1, 24), np.float32)
    f = pair.dense.encode(x[0].astype(np.float64))
    assert pair.sae.encode(x)[0].top_indices.tolist() == np.flatnonzero(f).tolist()


def test_what_is_written_is_what_is_loaded(pair: Pair, tmp_path: Path) -> None:
    loaded = SparseAutoencoder.load(write_sae(tmp_path / "sae", pair))
    x = embeddings(4, 3)
    for a, b in zip(loaded.encode(x), pair.sae.encode(x), strict=True):
        assert a.top_indices.tolist() == b.top_indices.tolist()
        assert a.top_acts.tolist() == b.top_acts.tolist()


def fault_in_weights(tmp_path: Path, **changes: torch.Tensor | None) -> str:
    pair = random_sae("jumprelu")
    directory = write_sae(tmp_path / "sae", pair)
    tensors = {name: tensor for name, tensor in (pair.weights | changes).items() if tensor is not None}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "sae_weights.safetensors")
    with pytest.raises(BundleError) as error:
        SparseAutoencoder.load(directory)
    return str(error.value)


def test_weights_that_do_not_fit_are_refused_in_one_sentence(tmp_path: Path) -> None:
    assert "'W_dec' is missing" in fault_in_weights(tmp_path, W_dec=None)
    assert "'threshold' is missing" in fault_in_weights(tmp_path, threshold=None)
    assert "'scaling' does not belong" in fault_in_weights(tmp_path, scaling=torch.ones(1))
    assert "shape [96, 24], but cfg.json asks for [24, 96]" in fault_in_weights(tmp_path, W_enc=torch.zeros(96, 24))
    assert "'b_enc' holds NaN" in fault_in_weights(tmp_path, b_enc=torch.full((96,), torch.nan))
    assert "torch.int64" in fault_in_weights(tmp_path, b_dec=torch.zeros(24, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "gated"}, "architecture 'gated' is not one of"),
        ({"d_in": 0}, "'d_in' must be a number of at least 1"),
        ({"d_sae": None}, "'d_sae' must be"),
        ({"architecture": "topk", "k": 97}, "k 97 is more than the 96 features"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations must be 'none'"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm"),
    ],
)
def test_a_configuration_that_is_not_served_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    directory = write_sae(tmp_path / "sae", random_sae("standard"))
    config = json.loads((directory / "cfg.json").read_text())
    (directory / "cfg.json").write_text(json.dumps(config | changes))
    with pytest.raises(BundleError, match=r"cfg\.json") as error:
        SparseAutoencoder.load(directory)
    assert words in str(error.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cfg\.json: missing"):
        SparseAutoencoder.load(tmp_path)
    directory = write_sae(tmp_path / "sae", random_sae("standard"))
    (directory / "sae_weights.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(BundleError, match=r"sae_weights\.safetensors: not a readable"):
        SparseAutoencoder.load(directory)
    (directory / "sae_weights.safetensors").unlink()
    with pytest.raises(BundleError, match=r"sae_weights\.safetensors: missing"):
        SparseAutoencoder.load(directory)
    (directory / "cfg.json").write_text("{")
    with pytest.raises(BundleError, match=r"cfg\.json: not readable JSON"):
        SparseAutoencoder.load(directory)


@pytest.mark.parametrize(
    ("layout", "screening", "copies", "more"),
    [("saelens", "weights", 1.5, 0), ("saelens", "int8", 1.5, 96 * 24), ("rows", "weights", 1, 0)],
)
def test_the_memory_asked_for_is_the_file_what_is_turned_round_and_the_int8_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, screening: str, copies: float, more: int
) -> None:
    asked = []
    monkeypatch.setattr(model, "require_memory", lambda _what, needed, _hint: asked.append(needed))
    pair = random_sae("standard")
    if layout == "rows":
        write_weights(tmp_path, pair.in_memory, "float32")
    else:
        write_sae(tmp_path, pair)
    SparseAutoencoder.load(tmp_path, screening=screening)
    file = tmp_path / "sae_weights.safetensors"
    assert asked == [int(file.stat().st_size * copies) + more]
    file.unlink()
    with pytest.raises(BundleError):
        SparseAutoencoder.load(tmp_path, screening="weights")
    assert asked[1:] == [0]
