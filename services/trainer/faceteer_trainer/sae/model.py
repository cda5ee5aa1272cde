"""A BatchTopK sparse autoencoder, as it is trained and as it is saved.

    pre = W_enc (x - b_dec) + b_enc        f = pre where among the batch's k * b largest and > 0, else 0
    x_hat = W_dec f + b_dec                after training: f = pre where pre > threshold, else 0

Bussmann et al. 2024 for BatchTopK. It knows nothing of where the embeddings come from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class SparseAutoencoder(nn.Module):
    """Weights in SAELens' shapes: W_enc [d, n], b_enc [n], W_dec [n, d] with rows of norm 1, b_dec [d]."""

    def __init__(self, d_in: int, d_sae: int, k: float) -> None:
        super().__init__()
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        directions = nn.functional.normalize(torch.randn(d_sae, d_in), dim=-1)
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.T.clone())  # tied at the start: fewer dead latents
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", torch.zeros(()))

    def pre_acts(self, x: torch.Tensor) -> torch.Tensor:
        """[b, d] -> [b, n] before any feature is dropped."""
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def batch_topk(self, pre: torch.Tensor) -> torch.Tensor:
        """Keep the k * b largest positive pre-activations of a batch [b, n]."""
        positive = pre.relu()
        kept = min(round(self.k * len(pre)), positive.numel())
        least = positive.flatten().topk(kept, sorted=False).values.min()
        return positive * (positive >= least)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Features [b, n] as after training: each picture on its own, by the threshold."""
        pre = self.pre_acts(x)
        return pre.relu() * (pre > self.threshold)

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """[b, n] -> [b, d]."""
        return features @ self.W_dec + self.b_dec

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Bring the directions back to norm 1."""
        self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8)

    @torch.no_grad()
    def calibrate(self, embeds: torch.Tensor, chunk: int = 8192) -> None:
        """Set the threshold so that k features fire for a picture of `embeds` [m, d] on average."""
        sample = embeds[:: max(1, len(embeds) // chunk)]
        positive = self.pre_acts(sample).relu().flatten()
        kept = min(round(self.k * len(sample)), int((positive > 0).sum()) - 1)
        self.threshold.copy_(positive.topk(kept + 1, sorted=True).values[-1])


def save_sae(model: SparseAutoencoder, directory: Path, metadata: dict[str, Any]) -> None:
    """Write cfg.json and sae_weights.safetensors under SAELens' keys, in float16."""
    directory.mkdir(parents=True, exist_ok=True)
    card = {
        "architecture": "batchtopk", "d_in": model.d_in, "d_sae": model.d_sae, "k": model.k, "dtype": "float16",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "metadata": metadata,
    }  # fmt: skip
    (directory / "cfg.json").write_text(json.dumps(card, indent=2) + "\n")
    weights = {name: getattr(model, name).detach().half().contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    weights["topk_threshold"] = model.threshold.half()
    save_file(weights, directory / "sae_weights.safetensors")


def load_sae(directory: Path) -> SparseAutoencoder:
    """The model as a bundle holds it, in float32."""
    card = json.loads((directory / "cfg.json").read_text())
    model = SparseAutoencoder(card["d_in"], card["d_sae"], card["k"])
    weights = load_file(directory / "sae_weights.safetensors")
    weights["threshold"] = weights.pop("topk_threshold")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()
