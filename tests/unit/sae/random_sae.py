"""Small random SAEs, and an independent, dense, float64 implementation to hold them against."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.weights import SaeConfig, SaeWeights
from safetensors.torch import save_file

ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")


@dataclass
class Dense:
    """The formulas of the class's docstring, written out in float64 over all features at once."""

    architecture: str
    k: int
    W_enc: np.ndarray  # [d_in, d_sae]
    b_enc: np.ndarray
    W_dec: np.ndarray  # [d_sae, d_in]
    b_dec: np.ndarray
    b_pre: np.ndarray
    threshold: np.ndarray

    def encode(self, x: np.ndarray) -> np.ndarray:
        """[d_in] -> [d_sae]."""
        pre = (x - self.b_pre) @ self.W_enc + self.b_enc
        if self.architecture == "topk":
            least = np.sort(pre)[-self.k]
            return np.where((pre >= least) & (pre > 0), pre, 0.0)
        return np.where(pre > np.maximum(self.threshold, 0), pre, 0.0)

    def decode(self, f: np.ndarray) -> np.ndarray:
        """[d_sae] -> [d_in]."""
        return f @ self.W_dec + self.b_dec


@dataclass
class Pair:
    """An SAE, the same SAE written differently, and its parts."""

    sae: SparseAutoencoder
    dense: Dense
    config: SaeConfig
    weights: dict[str, torch.Tensor]

    @property
    def in_memory(self) -> SaeWeights:
        """As it is written and read."""
        c, w = self.config, self.weights
        threshold = w.get("threshold", w.get("topk_threshold"))
        return SaeWeights(
            c.architecture, w["W_enc"].T, w["b_enc"], w["W_dec"], w["b_dec"], c.apply_b_dec_to_input, c.k, threshold
        )


def random_sae(
    architecture: str,
    seed: int = 0,
    d_in: int = 24,
    d_sae: int = 96,
    k: int = 8,
    dtype: torch.dtype = torch.float32,
    apply_b_dec_to_input: bool = True,
) -> Pair:
    """A random SAE whose decoder rows are not of unit length, as in the published one."""
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(d_sae, d_in, generator=g) * (0.2 + torch.rand(d_sae, 1, generator=g))
    W_enc = (W_dec + 0.3 * torch.randn(d_sae, d_in, generator=g)).T
    weights = {
        "W_enc": W_enc.to(dtype),
        "b_enc": (0.5 * torch.randn(d_sae, generator=g)).to(dtype),
        "W_dec": W_dec.to(dtype),
        "b_dec": torch.randn(d_in, generator=g).to(dtype),
    }
    if architecture == "jumprelu":
        weights["threshold"] = (2 * torch.rand(d_sae, generator=g)).to(dtype)
    elif architecture == "batchtopk":
        weights["topk_threshold"] = torch.tensor(1.25).to(dtype)
    config = SaeConfig(architecture, d_in, d_sae, k if "topk" in architecture else 0, apply_b_dec_to_input, {})
    wide = {name: tensor.double().numpy() for name, tensor in weights.items()}
    b_pre = wide["b_dec"] if apply_b_dec_to_input else np.zeros(d_in)
    threshold = np.broadcast_to(wide.get("threshold", wide.get("topk_threshold", np.zeros(()))), (d_sae,))
    dense = Dense(architecture, k, wide["W_enc"], wide["b_enc"], wide["W_dec"], wide["b_dec"], b_pre, threshold)
    return Pair(SparseAutoencoder(config, weights), dense, config, weights)


def embeddings(seed: int, n: int, d_in: int = 24, scale: float = 3.0) -> np.ndarray:
    """Random embeddings, float32 [n, d_in]."""
    return (scale * np.random.default_rng(seed).standard_normal((n, d_in))).astype(np.float32)


def write_sae(directory: Path, pair: Pair) -> Path:
    """Writes a pair's SAE as a bundle holds it."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": pair.config.architecture,
        "d_in": pair.config.d_in,
        "d_sae": pair.config.d_sae,
        "k": pair.config.k,
        "apply_b_dec_to_input": pair.config.apply_b_dec_to_input,
        "normalize_activations": "none",
    }
    (directory / "cfg.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in pair.weights.items()}
    save_file(tensors, directory / "sae_weights.safetensors")
    return directory
