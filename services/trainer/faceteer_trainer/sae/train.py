"""Train a sparse autoencoder on embeddings [m, d]; generic in what the embeddings are of.

Dead latents are kept from dying by AuxK (Gao et al. 2024): those that have not fired for a while reconstruct what the
others leave over, and their loss is divided by the variance of that residual, or it would vanish as the fit gets good.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from faceteer_trainer.sae.model import SparseAutoencoder
from faceteer_trainer.training import Budget, Run, learning_rate, set_rate, step_generator


@dataclass(frozen=True)
class SaeSettings:
    """`k` is the mean number of features that fire for a picture."""

    d_sae: int = 128
    k: float = 10.0
    batch: int = 1024
    peak_rate: float = 2e-3
    aux_k: int = 16
    aux_weight: float = 1 / 32
    dead_after: int = 50  # steps without firing


def explained_variance(embeds: torch.Tensor, output: torch.Tensor) -> float:
    """1 - sum of var(x - x_hat) / sum of var(x) over [m, d]: variances by dimension, summed."""
    return float(1 - (embeds - output).var(0).sum() / embeds.var(0).sum())


def auxiliary_loss(
    model: SparseAutoencoder, pre: torch.Tensor, residual: torch.Tensor, dead: torch.Tensor, aux_k: int
) -> torch.Tensor:
    """How badly the dead latents [n] explain the residual [b, d], as a share of its variance."""
    count = min(aux_k, int(dead.sum()))
    if count == 0:
        return residual.new_zeros(())
    top = torch.where(dead, pre, -torch.inf).topk(count, dim=-1)
    features = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    variance = (residual - residual.mean(0)).square().sum(-1).mean().clamp_min(1e-8)
    return (features @ model.W_dec - residual).square().sum(-1).mean() / variance


def train_sae(
    embeds: torch.Tensor,
    directory: Path,
    budget: Budget,
    settings: SaeSettings | None = None,
    seed: int = 0,
    log_every: int = 500,
) -> SparseAutoencoder:
    """Train on `embeds` [m, d]; returns the model with its threshold calibrated."""
    settings = settings or SaeSettings()
    torch.manual_seed(seed)
    model = SparseAutoencoder(embeds.shape[1], settings.d_sae, settings.k)
    with torch.no_grad():
        model.b_dec.copy_(embeds.mean(0))
        # rows of the data as first directions: every latent starts where embeddings are
        rows = torch.randperm(len(embeds))[: settings.d_sae]
        starts = embeds[rows] - embeds.mean(0)
        model.W_dec[: len(rows)] = starts + 0.5 * starts.norm(dim=-1, keepdim=True) * model.W_dec[: len(rows)]
        model.normalise_decoder()
        model.W_enc.copy_(model.W_dec.T)
    scale = (embeds - embeds.mean(0)).square().sum(-1).mean()
    optimizer = torch.optim.Adam(model.parameters(), settings.peak_rate, betas=(0.9, 0.99))
    silent = _Silence(settings.d_sae)
    run = Run(directory, "sae", budget, {"model": model, "optimizer": optimizer, "silent": silent})
    for step in run.steps():
        rows = torch.randint(len(embeds), (settings.batch,), generator=step_generator(seed, step))
        x = embeds[rows]
        set_rate(optimizer, learning_rate(settings.peak_rate, step, run.progress))
        pre = model.pre_acts(x)
        features = model.batch_topk(pre)
        output = model.decode(features)
        silent.update(features)
        dead = silent.steps > settings.dead_after
        loss = (output - x).square().sum(-1).mean() / scale
        auxiliary = auxiliary_loss(model, pre, (x - output).detach(), dead, settings.aux_k)
        optimizer.zero_grad(set_to_none=True)
        (loss + settings.aux_weight * auxiliary).backward()
        optimizer.step()
        model.normalise_decoder()
        if step % log_every == 0:
            run.log(unexplained=loss.item(), dead=float(dead.sum()))
    model.calibrate(embeds)
    return model.eval()


class _Silence:
    """For how many steps each latent has not fired."""

    def __init__(self, count: int) -> None:
        self.steps = torch.zeros(count)

    def update(self, features: torch.Tensor) -> None:
        self.steps = torch.where((features > 0).any(0), 0.0, self.steps + 1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.steps = state["steps"]
