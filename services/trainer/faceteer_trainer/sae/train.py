"""Train a sparse autoencoder on embeddings [m, d]; generic in what the embeddings are of.

Dead latents are kept from dying by AuxK (Gao et al. 2024): those that have not fired for a while reconstruct what the
others leave over, and their loss is divided by the variance of that residual, or it would vanish as the fit gets good.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from faceteer_trainer.sae.model import SparseAutoencoder
from faceteer_trainer.sae.starts import neighbour_directions, skewed_directions
from faceteer_trainer.training import Budget, Run, learning_rate, set_rate, step_generator


@dataclass(frozen=True)
class SaeSettings:
    """`k` is the mean number of features that fire for a picture.

    In training it falls from `start_k` to `low_k` until `anneal` of the budget is used, which makes latents exclusive;
    then it is `k`, and latents that have died are set onto what is still unexplained.

    `prefixes`: shares of the dictionary that must reconstruct on their own (Matryoshka; Bussmann et al. 2025), so that
    the first latents stay general instead of splitting into conjunctions.
    """

    d_sae: int = 128
    k: float = 10.0
    batch: int = 512
    peak_rate: float = 1e-3
    aux_k: int = 16
    aux_weight: float = 1 / 32
    dead_after: int = 50  # steps without firing
    prefixes: tuple[float, ...] = (0.5, 1.0)
    start_k: float = 12.0
    low_k: float = 10.0
    anneal: float = 0.3
    wake_every: int = 200  # steps between looks for dead latents, after the anneal and until 75 % of the budget
    skewed: bool = True  # first directions of the first half of the latents: see `starts`
    neighbour: int = 5  # first directions lead to each picture from its neighbour of this rank; 0: random ones


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


def scheduled_k(settings: SaeSettings, progress: float) -> float:
    """How many features may fire for a picture on average, at this share of the budget."""
    if progress >= settings.anneal:
        return settings.k
    rest = max(0.0, 1 - 1.25 * progress / settings.anneal)
    return settings.low_k + max(0.0, settings.start_k - settings.low_k) * rest


@torch.no_grad()
def _wake(
    model: SparseAutoencoder, optimizer: torch.optim.Optimizer, dead: torch.Tensor, x: torch.Tensor,
    residual: torch.Tensor,
) -> None:  # fmt: skip
    """Point dead latents [n] at the longest residuals [b, d] of x [b, d], with fresh optimiser moments.

    Their bias lets each fire for three in a hundred pictures: one that fires for all would upset what is learnt.
    """
    indices = dead.nonzero().flatten()[: len(residual)]
    if len(indices) == 0:
        return
    rows = residual.norm(dim=-1).topk(len(indices)).indices
    directions = torch.nn.functional.normalize(residual[rows], dim=-1)
    bias = -((x - model.b_dec) @ directions.T).quantile(0.97, dim=0)
    model.W_dec[indices], model.W_enc[:, indices], model.b_enc[indices] = directions, directions.T, bias
    for parameter, index in ((model.W_dec, indices), (model.W_enc, (slice(None), indices)), (model.b_enc, indices)):
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][moment][index] = 0.0


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
        if settings.neighbour:
            model.W_dec.copy_(neighbour_directions(embeds, settings.d_sae, settings.neighbour, seed))
        model.normalise_decoder()
        model.W_enc.copy_(model.W_dec.T)
        if settings.skewed:
            starts = skewed_directions(embeds, settings.d_sae // 2, seed)
            found = len(starts.skewness)
            model.W_dec[:found], model.W_enc[:, :found] = starts.decoder, starts.encoder
    scale = (embeds - embeds.mean(0)).square().sum(-1).mean()
    optimizer = torch.optim.Adam(model.parameters(), settings.peak_rate, betas=(0.9, 0.99))
    silent = _Silence(settings.d_sae)
    run = Run(directory, "sae", budget, {"model": model, "optimizer": optimizer, "silent": silent})
    for step in run.steps():
        model.b_dec.requires_grad_(False)  # stays the mean: a trained one would take one value of each kind for granted
        rows = torch.randint(len(embeds), (settings.batch,), generator=step_generator(seed, step))
        x = embeds[rows]
        set_rate(optimizer, learning_rate(settings.peak_rate, step, run.progress))
        model.k = scheduled_k(settings, run.progress)
        pre = model.pre_acts(x)
        features = model.batch_topk(pre)
        output = model.decode(features)
        silent.update(features)
        dead = silent.steps > settings.dead_after
        whole = (output - x).square().sum(-1).mean() / scale
        loss = whole
        for share in settings.prefixes[:-1]:
            size = round(share * settings.d_sae)
            loss = loss + (features[:, :size] @ model.W_dec[:size] + model.b_dec - x).square().sum(-1).mean() / scale
        auxiliary = auxiliary_loss(model, pre, (x - output).detach(), dead, settings.aux_k)
        optimizer.zero_grad(set_to_none=True)
        (loss + settings.aux_weight * auxiliary).backward()
        optimizer.step()
        model.normalise_decoder()
        if settings.anneal < run.progress < 0.75 and step % settings.wake_every == 0:
            _wake(model, optimizer, dead, x, (x - output).detach())
            silent.steps[dead] = 0
        if step % log_every == 0:
            run.log(unexplained=whole.item(), dead=float(dead.sum()))
    model.k = settings.k
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
