"""Random SAEs, and what an SAE does written out plainly in float64: the yardstick of these tests.

Knows nothing of faceteer_sae but its class and its config.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faceteer_sae.model import FeatureActivations, SparseAutoencoder
from faceteer_sae.statistics import FeatureStatistics
from faceteer_sae.weights import SaeConfig
from safetensors.torch import save_file

ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")
D_IN, D_SAE, K = 12, 40, 6


def config(architecture: str, *, apply_b_dec_to_input: bool = True, **metadata: Any) -> SaeConfig:
    return SaeConfig(architecture, D_IN, D_SAE, K if "topk" in architecture else 0, apply_b_dec_to_input, metadata)


def weights(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Decoder rows of different lengths, biases, thresholds above zero: nothing that happens to be neutral."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    made = {
        "W_enc": normal(D_IN, D_SAE),
        "b_enc": 0.5 * normal(D_SAE),
        "W_dec": normal(D_SAE, D_IN),
        "b_dec": normal(D_IN),
    }
    if architecture == "jumprelu":
        made["threshold"] = normal(D_SAE).abs()
    if architecture == "batchtopk":
        made["topk_threshold"] = torch.tensor(1.5)
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def sae(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> SparseAutoencoder:
    return SparseAutoencoder(config(architecture, **options), weights(architecture, seed, dtype))


def embedding(seed: int, scale: float = 1.0) -> np.ndarray:
    """float32 [d_in]."""
    return (scale * np.random.default_rng(seed).standard_normal(D_IN)).astype(np.float32)


def statistics(seed: int = 0) -> FeatureStatistics:
    """p99 of 0.5 to 3, feature 7 dead; 1's rivals are 2 and 3, 4's are 3 and 5."""
    p99 = np.random.default_rng(seed).uniform(0.5, 3.0, D_SAE).astype(np.float32)
    p99[7] = 0
    offsets = np.zeros(D_SAE + 1, np.int64)
    offsets[2:] += 2
    offsets[5:] += 2
    return FeatureStatistics(np.full(D_SAE, 0.1, np.float32), p99, offsets, np.array([2, 3, 3, 5], np.int32))


def plain_encode(
    made: dict[str, torch.Tensor], architecture: str, x: np.ndarray, *, apply_b_dec_to_input: bool = True
) -> np.ndarray:
    """All activations of one embedding, float64 [d_sae], feature by feature as the papers write it."""
    w = {name: tensor.double().numpy() for name, tensor in made.items()}
    b_pre = w["b_dec"] if apply_b_dec_to_input else np.zeros(D_IN)
    pre = (x.astype(np.float64) - b_pre) @ w["W_enc"] + w["b_enc"]
    f = np.zeros(D_SAE)
    strongest = sorted(range(D_SAE), key=lambda i: -pre[i])[:K]
    for i in range(D_SAE):
        fires = {
            "standard": pre[i] > 0,
            "topk": pre[i] > 0 and i in strongest,
            "batchtopk": pre[i] > 0 and pre[i] > w.get("topk_threshold", np.inf),
            "jumprelu": pre[i] > 0 and pre[i] > w["threshold"][i] if "threshold" in w else False,
        }[architecture]
        if fires:
            f[i] = pre[i]
    return f


def plain_decode(made: dict[str, torch.Tensor], f: np.ndarray) -> np.ndarray:
    """float64 [d_in]."""
    return f @ made["W_dec"].double().numpy() + made["b_dec"].double().numpy()


def dense(features: FeatureActivations) -> np.ndarray:
    """Activations of all features, float32 [d_sae]."""
    f = np.zeros(D_SAE, np.float32)
    f[features.top_indices] = features.top_acts
    return f


def write_sae(directory: Path, architecture: str, /, **changes: Any) -> Path:
    """cfg.json and sae_weights.safetensors; ``changes`` replace entries of cfg.json, or weights by their names."""
    made = weights(architecture)
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {},
    }
    if "topk" in architecture:
        cfg["k"] = K
    for name, value in changes.items():
        target: dict[str, Any] = made if isinstance(value, torch.Tensor) or name in made else cfg
        if value is None:
            del target[name]
        else:
            target[name] = value
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cfg.json").write_text(json.dumps(cfg))
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, directory / "sae_weights.safetensors")
    return directory
