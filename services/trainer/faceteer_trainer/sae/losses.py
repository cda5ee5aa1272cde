"""What training minimises, for every architecture, by sparse kernels or by whole matrices.

x is in units of the corpus' root mean square distance from its mean (standard: as it is, for its published loss
depends on scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from faceteer_trainer.sae.autoencoder import Autoencoder
from faceteer_trainer.sae.kernels import Pairs, sparse_decode, sparse_encode
from faceteer_trainer.sae.selection import select_batch_topk, select_topk


@dataclass(frozen=True)
class Loss:
    """What is minimised.

    Attributes:
        k: latents that fire for a row: exactly (topk), in the mean (batchtopk), aimed at (jumprelu).
        l1: standard's weight of ``sum over batch and latents of |f| ||d||``.
        l0_weight: jumprelu's weight of the squared relative miss of k.
        bandwidth: jumprelu's kernel width, in units of x.
        aux_k: dead latents that try to explain the residual, a row; 0 leaves them dead.
        aux_weight: of that, against the main loss.
        prefixes: nested shares of the dictionary that must each reconstruct on their own, so that the first latents
            stay general (Matryoshka, Bussmann et al. 2025); the last is 1.
    """

    k: float = 32
    l1: float = 4e-5
    l0_weight: float = 1.0
    bandwidth: float = 0.03
    aux_k: int = 256
    aux_weight: float = 1 / 32
    prefixes: tuple[float, ...] = (1.0,)


class Losses(NamedTuple):
    """Of one batch.

    Attributes:
        total: what is minimised, 0-d with a gradient.
        unexplained: mean squared error over mean squared distance of the batch from its mean.
        l0: firings a row.
        fired: bool [n].
        auxiliary: AuxK's loss, 0 where nothing is dead.
        residual: x - x_hat [b, d], without a gradient.
    """

    total: torch.Tensor
    unexplained: torch.Tensor
    l0: float
    fired: torch.Tensor
    auxiliary: torch.Tensor
    residual: torch.Tensor


def published_loss(
    x: torch.Tensor, x_hat: torch.Tensor, f: torch.Tensor, W_dec: torch.Tensor, l1: float
) -> torch.Tensor:
    """``mse(x_hat, x) + l1 * sum over batch and latents of |f_i| ||d_i||``: mean over elements, sum over firings.

    Of x, x_hat [b, d], f [b, n], W_dec [n, d]. So l1's strength grows with batch x d. Daujotas 2024.
    """
    penalty: torch.Tensor = (f.abs().sum(0) * W_dec.norm(dim=-1)).sum()
    return (x_hat - x).square().mean() + l1 * penalty


class _Jump(torch.autograd.Function):
    """JumpReLU and its L0, with the pseudo-derivatives of Rajamanoharan et al. 2024, equations 11 and 12."""

    @staticmethod
    def forward(ctx: Any, pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> tuple[torch.Tensor, ...]:
        on = pre > threshold
        ctx.save_for_backward(pre, threshold, on)
        ctx.bandwidth = bandwidth
        return pre * on, on.to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad_f: torch.Tensor, grad_on: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pre, threshold, on = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth  # the rectangle kernel over eps
        return grad_f * on, -(near * (threshold * grad_f + grad_on)).sum(0), None


def jump(pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``f = pre H(pre - threshold)`` and ``H(pre - threshold)``, both [b, n], of pre [b, n] and threshold [n] > 0."""
    f, on = _Jump.apply(pre, threshold, bandwidth)
    return f, on


def _mean_square(error: torch.Tensor) -> torch.Tensor:
    return error.square().sum(-1).mean()


def _prefix_ends(model: Autoencoder, loss: Loss) -> list[int]:
    return [max(1, round(share * model.d_sae)) for share in loss.prefixes]


def _auxiliary(model: Autoencoder, x_in: torch.Tensor, residual: torch.Tensor, dead: torch.Tensor, loss: Loss,
               bf16: bool) -> torch.Tensor:  # fmt: skip
    """How badly the dead latents explain the residual [b, d], over its own square (AuxK, Gao et al. 2024)."""
    latents = dead.nonzero()[:, 0]
    if loss.aux_k == 0 or len(latents) == 0:
        return residual.new_zeros(())
    pairs = select_topk(x_in, model.W_enc, model.b_enc, min(loss.aux_k, len(latents)), bf16, latents)
    if len(pairs.rows) == 0:
        return residual.new_zeros(())
    acts = sparse_encode(x_in, model.W_enc, model.b_enc, pairs).relu()
    found = sparse_decode(acts, model.W_dec, pairs, len(x_in))
    return _mean_square(found - residual) / _mean_square(residual).clamp_min(1e-12)


def sparse_losses(model: Autoencoder, x: torch.Tensor, dead: torch.Tensor, loss: Loss, bf16: bool = False) -> Losses:
    """topk and batchtopk by the sparse kernels: gradients of W_enc, W_dec and b_enc are sparse."""
    x_in = model.centred(x)
    if model.architecture == "topk":
        pairs = select_topk(x_in, model.W_enc, model.b_enc, round(loss.k), bf16)
    else:
        pairs, _ = select_batch_topk(x_in, model.W_enc, model.b_enc, round(loss.k * len(x)), bf16)
    acts = sparse_encode(x_in, model.W_enc, model.b_enc, pairs).relu()
    x_hat = model.b_dec.expand_as(x)
    errors, start = [], 0
    for end in _prefix_ends(model, loss):
        inside = slice(None) if (start, end) == (0, model.d_sae) else (pairs.latents >= start) & (pairs.latents < end)
        part = Pairs(pairs.rows[inside], pairs.latents[inside])
        x_hat, start = x_hat + sparse_decode(acts[inside], model.W_dec, part, len(x)), end
        errors.append(_mean_square(x_hat - x))
    residual = (x - x_hat).detach()
    auxiliary = _auxiliary(model, x_in, residual, dead, loss, bf16)
    fired = torch.zeros_like(dead)
    fired[pairs.latents] = True
    l0 = len(pairs.rows) / len(x)
    return _losses(torch.stack(errors).mean(), errors[-1], auxiliary, loss, x, residual, l0, fired)


def dense_losses(model: Autoencoder, x: torch.Tensor, dead: torch.Tensor, loss: Loss, bf16: bool = False) -> Losses:
    """Every architecture by whole matrices: a batch's pre-activations [b, n] are held, and all gradients are dense."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        x_in = model.centred(x)
        pre = (x_in @ model.W_enc.T).float() + model.b_enc
        sparsity = x.new_zeros(())
        if model.architecture == "standard":
            f = pre.relu()
        elif model.architecture == "jumprelu":
            assert model.log_threshold is not None
            f, on = jump(pre, model.log_threshold.exp(), loss.bandwidth)
            sparsity = loss.l0_weight * (on.sum(-1).mean() / loss.k - 1).square()
        elif model.architecture == "topk":
            top = pre.relu().topk(min(round(loss.k), model.d_sae), dim=-1, sorted=False)
            f = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
        else:
            positive = pre.relu()
            top = positive.flatten().topk(min(round(loss.k * len(x)), positive.numel()), sorted=False)
            f = torch.zeros_like(positive).flatten().scatter(0, top.indices, top.values).view_as(positive)
        x_hat = model.b_dec.expand_as(x)
        errors, start = [], 0
        for end in _prefix_ends(model, loss):
            x_hat, start = x_hat + (f[:, start:end] @ model.W_dec[start:end]).float(), end
            errors.append(_mean_square(x_hat - x))
    residual = (x - x_hat).detach()
    if model.architecture == "standard":
        main = published_loss(x, x_hat, f, model.W_dec, loss.l1)
        auxiliary = x.new_zeros(())
    else:
        main = torch.stack(errors).mean() + sparsity
        auxiliary = _dense_auxiliary(model, pre, residual, dead, loss)
    on_rows = f > 0
    return _losses(main, errors[-1], auxiliary, loss, x, residual, float(on_rows.sum()) / len(x), on_rows.any(0))


def _dense_auxiliary(
    model: Autoencoder, pre: torch.Tensor, residual: torch.Tensor, dead: torch.Tensor, loss: Loss
) -> torch.Tensor:
    latents = dead.nonzero()[:, 0]
    if loss.aux_k == 0 or len(latents) == 0:
        return residual.new_zeros(())
    own = pre[:, latents].relu()
    top = own.topk(min(loss.aux_k, len(latents)), dim=-1, sorted=False)
    f = torch.zeros_like(own).scatter(-1, top.indices, top.values)
    return _mean_square(f @ model.W_dec[latents] - residual) / _mean_square(residual).clamp_min(1e-12)


def _losses(
    main: torch.Tensor, error: torch.Tensor, auxiliary: torch.Tensor, loss: Loss, x: torch.Tensor,
    residual: torch.Tensor, l0: float, fired: torch.Tensor,
) -> Losses:  # fmt: skip
    unexplained = error.detach() / _mean_square(x - x.mean(0)).clamp_min(1e-12)
    return Losses(main + loss.aux_weight * auxiliary, unexplained, l0, fired, auxiliary.detach(), residual)
