"""Thin a trained SAE: near copies and latents that hardly ever fire go, and the others learn what those held.

Near copies share the work of a feature, so that turning one of them off leaves the feature on. Every pair of latents is
looked at, which suits dictionaries of up to some thousands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from faceteer_sae.weights import SaeWeights

from faceteer_trainer.sae.autoencoder import Autoencoder
from faceteer_trainer.sae.selection import select_batch_topk

# Latents beyond which the matrices of all pairs do not fit.
MOST_LATENTS = 16_384
# Rows of which the whole matrix of activations is held.
_SAMPLE = 8192
# Steps between two looks at what sets a feature's rows apart, and which features are rivals.
_LOOK_EVERY = 50
_WARMUP = 50


@dataclass(frozen=True)
class Thinning:
    """What goes, and how what stays is trained. The defaults are those found for the postcards.

    Attributes:
        k: firings a row in the mean; 0: as the SAE has it.
        alike: decoder cosine or correlation of activations above which one of two latents goes.
        least_share: of rows, on which a latent that stays must fire.
        rounds: at most so many rounds of removing and training; each ends when nothing more goes.
        steps: of training after each removal.
        rate: the learning rate at its peak.
        batch: rows a step.
        whole: of what sets a feature's rows apart, the share that its activation alone must carry, so that turning it
            off takes all of that away; 0: the second stage, which trains for this, is left out.
        apart: weight of rivals' products: features that hardly ever fire strongly together shall never.
        rare_together: rivals fire together at most this often, against what independent ones would.
        strong: only features that fire this strongly, against the strongest tenth, must be whole: weak ones refine.
        seed: of batches.
    """

    k: float = 0.0
    alike: float = 0.8
    least_share: float = 2e-3
    rounds: int = 4
    steps: int = 1000
    rate: float = 5e-4
    batch: int = 512
    whole: float = 1.06
    apart: float = 0.5
    rare_together: float = 0.6
    strong: float = 0.5
    seed: int = 0


class _Aims(NamedTuple):
    """What the second stage trains for, as it stands: projections [n, d], and which features [n, n] are rivals."""

    projections: torch.Tensor
    rivals: torch.Tensor


@torch.no_grad()
def superfluous(model: Autoencoder, x: torch.Tensor, settings: Thinning) -> list[int]:
    """Latents that are rare on x [m, d], or too like one whose activations are larger."""
    f = model.encode(x)
    weight = f.square().mean(0)
    gone = set(((f > 0).float().mean(0) < settings.least_share).nonzero()[:, 0].tolist())
    directions = torch.nn.functional.normalize(model.W_dec, dim=-1)
    centred = f - f.mean(0)
    centred = centred / centred.norm(dim=0).clamp_min(1e-9)
    pairs = (torch.maximum(directions @ directions.T, centred.T @ centred) > settings.alike).triu(1).nonzero()
    order = weight[pairs].sum(-1).argsort(descending=True)
    for one, other in pairs[order].tolist():
        if not gone & {one, other}:
            gone.add(one if weight[one] < weight[other] else other)
    return sorted(gone)


def without(model: Autoencoder, gone: list[int]) -> Autoencoder:
    """A copy of a batchtopk model that lacks some of its latents."""
    kept = torch.ones(model.d_sae, dtype=torch.bool)
    kept[gone] = False
    whole = model.weights()
    return Autoencoder(
        SaeWeights(
            whole.architecture, whole.W_enc[kept].clone(), whole.b_enc[kept].clone(), whole.W_dec[kept].clone(),
            whole.b_dec.clone(), whole.apply_b_dec_to_input, whole.k, whole.threshold, whole.metadata,
        )
    )  # fmt: skip


@torch.no_grad()
def distinctions(model: Autoencoder, x: torch.Tensor, strong: float) -> torch.Tensor:
    """How the rows of x [m, d] on which a feature fires differ from the mean, as projections [n, d].

    A feature's activation times its direction, dotted with its row here, is 1 where it carries all that sets its rows
    apart. Zero for features that fire on under 2 % of the rows, or weakly where they fire: those only refine others.
    """
    f = model.encode(x)
    fires = (f > 0).float()
    apart = (fires.T @ (x - x.mean(0))) / fires.sum(0).clamp_min(1)[:, None]
    strength = _mean_activation(f) * (fires.mean(0) > 0.02)
    held = strength > strong * strength.quantile(0.9)
    return apart / apart.square().sum(-1, keepdim=True).clamp_min(1e-9) * held[:, None]


@torch.no_grad()
def rivals(model: Autoencoder, x: torch.Tensor, rare_together: float) -> torch.Tensor:
    """bool [n, n]: common features that fire strongly together on x [m, d] less than so often, against chance."""
    f = model.encode(x)
    fires = (f > 0.3 * _mean_activation(f).clamp_min(1e-6)).float()
    share = fires.mean(0)
    common = (share > 0.02) & (share <= 0.6)
    together = fires.T @ fires / len(fires)
    return (together < rare_together * share[:, None] * share) & common[:, None] & common


def _mean_activation(f: torch.Tensor) -> torch.Tensor:
    """Of each feature where it fires, [n] of f [m, n]."""
    return f.sum(0) / (f > 0).sum(0).clamp_min(1)


def _train(model: Autoencoder, x: torch.Tensor, k: float, settings: Thinning, seed: int) -> None:
    """Train in place on rows x [m, d] with k firings a row; nothing is reset, so nothing comes back to life."""
    scale = (x - x.mean(0)).square().sum(-1).mean()
    model.b_dec.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], settings.rate, (0.9, 0.99))
    draw = torch.Generator().manual_seed(seed)
    aims = None
    for step in range(settings.steps):
        if settings.whole and step % _LOOK_EVERY == 0:
            aims = _aims(model, x[:_SAMPLE], k, settings)
        rows = x[torch.randint(len(x), (settings.batch,), generator=draw)]
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * min(1.0, (step + 1) / _WARMUP) * (1 - step / settings.steps)
        pre = (model.centred(rows) @ model.W_enc.T + model.b_enc).relu()
        top = pre.flatten().topk(min(round(k * len(rows)), pre.numel()), sorted=False)
        f = torch.zeros_like(pre).flatten().scatter(0, top.indices, top.values).view_as(pre)
        loss = (f @ model.W_dec + model.b_dec - rows).square().sum(-1).mean() / scale
        if aims is not None:
            carried = _mean_activation(f) * (model.W_dec * aims.projections).sum(-1)
            lacking = (settings.whole - carried).relu() * (aims.projections.square().sum(-1) > 0)
            loss = loss + lacking.square().mean()
            loss = loss + settings.apart * ((f @ aims.rivals) * f).sum(-1).mean() / scale
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        model.normalise_decoder()
    _calibrate(model, x, k)


def _aims(model: Autoencoder, x: torch.Tensor, k: float, settings: Thinning) -> _Aims:
    _calibrate(model, x, k)
    projections = distinctions(model, x, settings.strong)
    held = (projections.square().sum(-1) > 0).float()
    return _Aims(projections, rivals(model, x, settings.rare_together).float() * held[:, None] * held)


@torch.no_grad()
def _calibrate(model: Autoencoder, x: torch.Tensor, k: float) -> None:
    x_in = model.centred(x[:_SAMPLE])
    model.threshold.copy_(select_batch_topk(x_in, model.W_enc, model.b_enc, round(k * len(x_in)))[1])


def thin(
    model: Autoencoder, x: torch.Tensor, settings: Thinning | None = None, tell: Callable[[str], None] = print
) -> Autoencoder:
    """A batchtopk model without its superfluous latents, trained on rows x [m, d]; the model given stays as it is.

    First plainly, until nothing goes. Then, where `whole` is above 0, so that features carry all of what they stand
    for; what that leaves rare or alike, by bounds a little more lenient, goes too.
    """
    settings = settings or Thinning()
    k = settings.k or float(model.k)
    scale = float((x - x.mean(0)).square().sum(-1).mean().sqrt())
    x, model = x / scale, without(Autoencoder(model.weights(1 / scale)), [])
    model = _rounds(model, x, float(model.k), replace(settings, whole=0.0), tell)
    if settings.whole:
        _train(model, x, k, replace(settings, steps=settings.steps * 3 // 2, rate=settings.rate * 0.4), settings.seed)
        lenient = replace(
            settings, least_share=settings.least_share * 0.65, alike=min(0.99, settings.alike * 1.1),
            steps=settings.steps * 3 // 5, rate=settings.rate * 0.1, seed=settings.seed + 1,
        )  # fmt: skip
        model = _rounds(model, x, k, lenient, tell)
    elif k != model.k:
        _train(model, x, k, settings, settings.seed)
    model.k = round(k)
    return Autoencoder(model.weights(scale))


def _rounds(
    model: Autoencoder, x: torch.Tensor, k: float, settings: Thinning, tell: Callable[[str], None]
) -> Autoencoder:
    _calibrate(model, x, k)
    for number in range(settings.rounds):
        gone = superfluous(model, x, settings)
        tell(f"{len(gone)} of {model.d_sae} latents go")
        if not gone:
            break
        model = without(model, gone)
        _train(model, x, k, settings, settings.seed + 17 * (number + 1))
    return model
