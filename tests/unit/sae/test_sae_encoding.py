"""Encoding and decoding against numbers done by hand and against the plain way in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from faceteer_runtime.bundle import BundleError
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.weights import SaeConfig
from unit.sae import sae_models as models
from unit.sae.sae_models import ARCHITECTURES


def hand(architecture: str, **more: torch.Tensor) -> SparseAutoencoder:
    """Two inputs, three features: pre-activations of (3, 4) are 3, 4 and 7 - 6 = 1."""
    weights = {
        "W_enc": torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]),
        "b_enc": torch.tensor([0.0, 0.0, -6.0]),
        "W_dec": torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]),
        "b_dec": torch.tensor([10.0, 20.0]),
    }
    return SparseAutoencoder(SaeConfig(architecture, 2, 3, 2, False, {}), weights | more)


@pytest.mark.parametrize(
    ("architecture", "more", "fires"),
    [
        ("standard", {}, {0: 3, 1: 4, 2: 1}),
        ("topk", {}, {0: 3, 1: 4}),
        ("batchtopk", {"topk_threshold": torch.tensor(3.5)}, {1: 4}),
        ("jumprelu", {"threshold": torch.tensor([3.0, 1.0, 0.5])}, {1: 4, 2: 1}),
    ],
)
def test_each_architecture_fires_as_by_hand(
    architecture: str, more: dict[str, torch.Tensor], fires: dict[int, float]
) -> None:
    (features,) = hand(architecture, **more).encode(np.array([[3.0, 4.0]], np.float32))
    assert dict(zip(features.top_indices.tolist(), features.top_acts.tolist(), strict=True)) == fires


def test_decoding_by_hand() -> None:
    x_hat = hand("standard").decode(np.array([0, 2]), np.array([3.0, 1.0]))
    assert x_hat.tolist() == [10 + 3 + 2, 20 + 2]
    assert hand("standard").decode(np.array([], np.int64), np.array([])).tolist() == [10, 20]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pre_bias", [True, False])
def test_encoding_is_the_plain_way_in_any_number_type(architecture: str, dtype: torch.dtype, pre_bias: bool) -> None:
    made = models.weights(architecture, 3, dtype)
    sae = SparseAutoencoder(models.config(architecture, apply_b_dec_to_input=pre_bias), made)
    x = np.stack([models.embedding(seed, scale) for seed in range(20) for scale in (0.01, 1.0, 40.0)])
    for one, features in zip(x, sae.encode(x), strict=True):
        expected = models.plain_encode(made, architecture, one, apply_b_dec_to_input=pre_bias)
        assert np.allclose(models.dense(features), expected, rtol=1e-5, atol=1e-4)
        assert features.top_indices.tolist() == np.flatnonzero(expected).tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_features_activation_is_the_same_number_alone_in_a_batch_and_among_all(architecture: str) -> None:
    sae = models.sae(architecture, dtype=torch.float16)
    x = np.stack([models.embedding(seed) for seed in range(9)])
    together, every = sae.encode(x), np.arange(models.D_SAE)
    for one, features in zip(x, together, strict=True):
        (alone,) = sae.encode(one[None])
        assert np.array_equal(models.dense(features), models.dense(alone))
        assert np.array_equal(models.dense(features), sae.activations(one, every, features.kth_pre_act))
        assert np.array_equal(models.dense(features), features.at(every))


def test_the_kth_largest_pre_activation_comes_with_topk() -> None:
    sae = models.sae("topk")
    x = models.embedding(1)
    (features,) = sae.encode(x[None])
    assert features.kth_pre_act == np.sort(sae.pre_acts(x, np.arange(models.D_SAE)))[-models.K]


def test_topk_never_fires_on_what_is_not_positive() -> None:
    made = models.weights("topk")
    made["b_enc"] -= 1000
    (features,) = SparseAutoencoder(models.config("topk"), made).encode(models.embedding(0)[None])
    assert len(features.top_indices) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_sae_comes_back_from_disk(architecture: str, tmp_path: Path) -> None:
    loaded = SparseAutoencoder.load(models.write_sae(tmp_path, architecture))
    x = models.embedding(4)
    assert np.array_equal(
        models.dense(loaded.encode(x[None])[0]), models.dense(models.sae(architecture).encode(x[None])[0])
    )


@pytest.mark.parametrize(
    ("architecture", "changes", "says"),
    [
        ("topk", {"W_dec": None}, "'W_dec' is missing"),
        ("jumprelu", {"threshold": None}, "'threshold' is missing"),
        ("batchtopk", {"topk_threshold": None}, "'topk_threshold' is missing"),
        ("standard", {"threshold": torch.zeros(models.D_SAE)}, "'threshold' does not belong"),
        ("standard", {"b_enc": torch.zeros(3)}, "'b_enc' has shape"),
        ("standard", {"W_enc": torch.zeros(models.D_SAE, models.D_IN)}, "'W_enc' has shape"),
        ("standard", {"b_dec": torch.full((models.D_IN,), float("nan"))}, "NaN"),
        ("standard", {"W_enc": torch.full((models.D_IN, models.D_SAE), float("inf"))}, "NaN or infinite"),
        ("standard", {"b_dec": torch.zeros(models.D_IN, dtype=torch.float64)}, "float64"),
        ("standard", {"architecture": "gated"}, "'gated' is not one of"),
        ("standard", {"d_in": "12"}, "'d_in' must be a number"),
        ("topk", {"k": None}, "'k' must be a number"),
        ("topk", {"k": models.D_SAE + 1}, "more than the 40 features"),
        ("standard", {"normalize_activations": "layer_norm"}, "normalize_activations"),
    ],
)
def test_unusable_weights_are_refused_in_one_sentence(
    architecture: str, changes: dict[str, object], says: str, tmp_path: Path
) -> None:
    models.write_sae(tmp_path, architecture, **changes)
    with pytest.raises(BundleError) as caught:
        SparseAutoencoder.load(tmp_path)
    message = str(caught.value)
    assert says in message
    assert str(tmp_path) in message
    assert "\n" not in message


def test_missing_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cfg\.json: missing"):
        SparseAutoencoder.load(tmp_path)
    models.write_sae(tmp_path, "standard")
    (tmp_path / "sae_weights.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(BundleError, match=r"sae_weights\.safetensors: not a readable"):
        SparseAutoencoder.load(tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(BundleError, match=r"sae_weights\.safetensors: missing"):
        SparseAutoencoder.load(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(BundleError, match="not readable JSON"):
        SparseAutoencoder.load(tmp_path)
