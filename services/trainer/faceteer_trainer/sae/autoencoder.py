"""The sparse autoencoder over many embeddings at once, on any device: what is trained, measured and evaluated.

The service has a class of its own for one embedding at a time (:mod:`faceteer_sae.model`). Between the two, and between
files, an SAE is :class:`faceteer_sae.weights.SaeWeights`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from faceteer_sae.weights import SaeWeights, read_weights
from torch import nn

from faceteer_trainer.sae.kernels import Pairs, pair_dots
from faceteer_trainer.sae.selection import select_batch_topk, select_topk

# Features whose activations are held together: with 1,024 rows 16 MB.
FEATURES = 4096


class Autoencoder(nn.Module):
    """W_enc and W_dec both [n, d] (rows of latents), b_enc [n], b_dec [d], float32.

    pre = W_enc (x - b_pre) + b_enc        x_hat = W_dec f + b_dec        b_pre = b_dec or zero

    standard    f = max(pre, 0), decoder norms free
    topk        f = pre where among the row's k largest and > 0                              (Gao et al. 2024)
    batchtopk   f = pre where pre > threshold; in training: among the batch's k b largest    (Bussmann et al. 2024)
    jumprelu    f = pre where pre > threshold_i; in training: threshold_i = exp(log_threshold_i)
                                                                                     (Rajamanoharan et al. 2024)
    """

    threshold: torch.Tensor
    log_threshold: nn.Parameter | None

    def __init__(self, weights: SaeWeights) -> None:
        """Shares the matrices where they are float32."""
        super().__init__()
        self.architecture, self.k, self.metadata = weights.architecture, weights.k, weights.metadata
        self.apply_b_dec_to_input = weights.apply_b_dec_to_input
        self.W_enc = nn.Parameter(weights.W_enc.float())
        self.W_dec = nn.Parameter(weights.W_dec.float())
        self.b_enc = nn.Parameter(weights.b_enc.float())
        self.b_dec = nn.Parameter(weights.b_dec.float())
        self.log_threshold = None
        self.register_buffer("threshold", torch.zeros(()) if weights.threshold is None else weights.threshold.float())

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Autoencoder:
        """Reads what a bundle's sae/ holds, in either layout.

        Raises:
            BundleError: what is wrong with which file.
        """
        return cls(read_weights(directory)).to(device)

    def weights(self, scale: float = 1.0) -> SaeWeights:
        """For embeddings ``scale`` times as long as those that this one takes; the matrices are shared."""
        threshold = self.threshold if self.log_threshold is None else self.log_threshold.detach().exp()
        return SaeWeights(
            self.architecture, self.W_enc.detach(), self.b_enc.detach() * scale, self.W_dec.detach(),
            self.b_dec.detach() * scale, self.apply_b_dec_to_input, self.k,
            threshold * scale if self.architecture in ("batchtopk", "jumprelu") else None, self.metadata,
        )  # fmt: skip

    @property
    def d_in(self) -> int:
        """The length of an embedding."""
        return self.W_enc.shape[1]

    @property
    def d_sae(self) -> int:
        """The number of latents."""
        return self.W_enc.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.b_dec.device

    @property
    def unit_norm(self) -> bool:
        """Whether training keeps decoder rows at norm 1."""
        return self.architecture != "standard"

    def centred(self, x: torch.Tensor) -> torch.Tensor:
        """x - b_pre [b, d]."""
        return x - self.b_dec if self.apply_b_dec_to_input else x

    @torch.no_grad()
    def blocks(self, x: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Activations of x [m, d] as they are served, some latents at a time: (first latent, [m, <= FEATURES]).

        For topk exactly k latents fire (or fewer, where fewer are above 0); of equal pre-activations at the k-th
        place, which the service lets all fire, one is taken.
        """
        x_in = self.centred(x)
        pairs = select_topk(x_in, self.W_enc, self.b_enc, self.k) if self.architecture == "topk" else None
        threshold = (self.threshold if self.log_threshold is None else self.log_threshold.exp()).clamp_min(0)
        threshold = threshold.expand(self.d_sae)
        for first in range(0, self.d_sae, FEATURES):
            part = slice(first, min(first + FEATURES, self.d_sae))
            if pairs is None:
                pre = torch.addmm(self.b_enc[part], x_in, self.W_enc[part].T)
                yield first, torch.where(pre > threshold[part], pre, 0.0)
                continue
            here = (pairs.latents >= part.start) & (pairs.latents < part.stop)
            chosen = Pairs(pairs.rows[here], pairs.latents[here])
            acts = x.new_zeros(len(x), part.stop - part.start)
            pre = pair_dots(x_in, self.W_enc, chosen) + self.b_enc[chosen.latents]
            acts[chosen.rows, chosen.latents - first] = pre.clamp_min(0)
            yield first, acts

    @torch.no_grad()
    def fire(self, x: torch.Tensor) -> tuple[Pairs, torch.Tensor]:
        """The firings on x [m, d] as they are served, rows rising, and their activations [P]."""
        rows, latents, acts = [], [], []
        for first, block in self.blocks(x):
            at, columns = block.nonzero(as_tuple=True)
            rows.append(at)
            latents.append(columns + first)
            acts.append(block[at, columns])
        where, which = torch.cat(rows), torch.cat(latents)
        order = (where * self.d_sae + which).argsort()
        return Pairs(where[order], which[order]), torch.cat(acts)[order]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Activations [m, n] of x [m, d] as they are served; of small dictionaries, for all of them are held."""
        return torch.cat([acts for _, acts in self.blocks(x)], 1)

    @torch.no_grad()
    def decode(self, f: torch.Tensor) -> torch.Tensor:
        """Reconstructions [m, d] of activations [m, n]."""
        return f @ self.W_dec + self.b_dec

    @torch.no_grad()
    def calibrate(self, x: torch.Tensor) -> None:
        """Sets batchtopk's threshold so that k latents fire for a row of x [m, d] in the mean."""
        self.threshold.copy_(select_batch_topk(self.centred(x), self.W_enc, self.b_enc, self.k * len(x))[1])

    @torch.no_grad()
    def normalise_decoder(self, latents: Any = slice(None)) -> None:
        """Brings decoder rows back to norm 1."""
        rows = self.W_dec[latents]
        self.W_dec[latents] = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def untrained(architecture: str, d_in: int, d_sae: int, k: int, seed: int = 0) -> Autoencoder:
    """An autoencoder to train: random decoder directions, the encoder tied to them, no biases."""
    directions = torch.empty(d_sae, d_in).normal_(generator=torch.Generator().manual_seed(seed))
    directions /= directions.norm(dim=-1, keepdim=True)
    standard = architecture == "standard"
    if standard:
        directions *= 0.1  # its penalty wants small columns at first (Anthropic, April 2024)
    model = Autoencoder(
        SaeWeights(
            architecture, directions.clone(), torch.zeros(d_sae), directions, torch.zeros(d_in), not standard,
            k if "topk" in architecture else 0,
        )
    )  # fmt: skip
    if architecture == "jumprelu":
        model.log_threshold = nn.Parameter(torch.full((d_sae,), 0.1).log())
    return model
