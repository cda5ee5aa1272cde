"""Sparse kernels of an SAE's step: their cost depends on the activations that fire, not on the dictionary's width.

Both matrices lie as rows, W_enc and W_dec [n, d], so that a
latent's vectors are contiguous. A *pair* is one firing: a row of the batch and a latent. The gradients of both matrices
are sparse tensors that hold only the latents of the pairs, and `RowAdam` moves only those.

The encoder's forward still reads every latent once (which ones fire is not known before): it is done without a
gradient, in chunks, in `selection`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional

# Pairs whose vectors are gathered at once: 8,192 x 1,280 float32 are 42 MB.
_GATHER = 8192


class Pairs(NamedTuple):
    """P firings of a batch, rows rising.

    Attributes:
        rows: int64 [P], numbers of rows of the batch.
        latents: int64 [P].
    """

    rows: torch.Tensor
    latents: torch.Tensor


def pair_dots(vectors: torch.Tensor, matrix: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """``vectors[row] . matrix[latent]`` of each pair: [P] of vectors [b, d] and matrix [n, d]."""
    found = vectors.new_empty(len(pairs.rows))
    for start in range(0, len(found), _GATHER):
        part = slice(start, start + _GATHER)
        found[part] = torch.linalg.vecdot(vectors[pairs.rows[part]], matrix[pairs.latents[part]])
    return found


def sum_by_row(weights: torch.Tensor, matrix: torch.Tensor, pairs: Pairs, batch: int) -> torch.Tensor:
    """``sum over a row's pairs of weight * matrix[latent]``: [b, d] of weights [P] and matrix [n, d]."""
    if len(weights) == 0:
        return matrix.new_zeros(batch, matrix.shape[1])
    offsets = torch.searchsorted(pairs.rows, torch.arange(batch, device=pairs.rows.device))
    return functional.embedding_bag(pairs.latents, matrix, offsets, mode="sum", per_sample_weights=weights)


def sum_by_latent(weights: torch.Tensor, vectors: torch.Tensor, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum over a latent's pairs of weight * vectors[row]`` of vectors [b, d].

    Returns:
        The u latents that have pairs, int64 [u] rising, and their sums [u, d].
    """
    order = pairs.latents.argsort(stable=True)
    latents, counts = torch.unique_consecutive(pairs.latents[order], return_counts=True)
    if len(latents) == 0:
        return latents, vectors.new_zeros(0, vectors.shape[1])
    offsets = counts.cumsum(0) - counts
    sums = functional.embedding_bag(
        pairs.rows[order], vectors, offsets, mode="sum", per_sample_weights=weights[order].contiguous()
    )
    return latents, sums


def _sparse(latents: torch.Tensor, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return torch.sparse_coo_tensor(latents[None], values, shape, is_coalesced=True, check_invariants=False)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, acts: torch.Tensor, W_dec: torch.Tensor, rows: torch.Tensor, latents: torch.Tensor, batch: int
    ) -> torch.Tensor:
        ctx.save_for_backward(acts, W_dec, rows, latents)
        return sum_by_row(acts, W_dec, Pairs(rows, latents), batch)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        acts, W_dec, rows, latents = ctx.saved_tensors
        grad, pairs = grad.contiguous(), Pairs(rows, latents)
        return pair_dots(grad, W_dec, pairs), _sparse(*sum_by_latent(acts, grad, pairs), W_dec.shape), None, None, None


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_in: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, rows: torch.Tensor,
        latents: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x_in, W_enc, rows, latents)
        return pair_dots(x_in, W_enc, Pairs(rows, latents)) + b_enc[latents]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_in, W_enc, rows, latents = ctx.saved_tensors
        pairs = Pairs(rows, latents)
        grad_x = sum_by_row(grad.contiguous(), W_enc, pairs, len(x_in)) if ctx.needs_input_grad[0] else None
        fired, sums = sum_by_latent(grad, x_in, pairs)
        bias = sum_by_latent(grad, torch.ones_like(x_in[:, :1]), pairs)[1][:, 0]
        return grad_x, _sparse(fired, sums, W_enc.shape), _sparse(fired, bias, W_enc.shape[:1]), None, None


def sparse_decode(acts: torch.Tensor, W_dec: torch.Tensor, pairs: Pairs, batch: int) -> torch.Tensor:
    """``W_dec f`` [b, d] of activations [P] of pairs; the gradient of W_dec [n, d] is sparse, coalesced."""
    x_hat: torch.Tensor = _Decode.apply(acts, W_dec, pairs.rows, pairs.latents, batch)
    return x_hat


def sparse_encode(x_in: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Pre-activations [P] of pairs, of x_in [b, d]; the gradients of W_enc [n, d] and b_enc [n] are sparse."""
    pre: torch.Tensor = _Encode.apply(x_in, W_enc, b_enc, pairs.rows, pairs.latents)
    return pre


class RowAdam:
    """Adam (Kingma and Ba 2015) that touches only the rows a sparse gradient holds; plain Adam for a dense gradient.

    Each row is an Adam run of its own over the steps in which it had a gradient: its moments do not decay while it is
    silent and its bias correction counts its own steps. A latent that fires for one picture in 10,000 so takes steps
    of the same size as one that fires for half of them.
    """

    def __init__(
        self, parameters: dict[str, torch.Tensor], betas: tuple[float, float] = (0.9, 0.999), eps: float = 6.25e-10
    ) -> None:
        self.parameters, self.betas, self.eps, self.rate = parameters, betas, eps, 0.0
        self.state = {
            name: {
                "exp_avg": torch.zeros_like(p, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
                "steps": torch.zeros(len(p), dtype=torch.int64, device=p.device),
            }
            for name, p in parameters.items()
        }

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient; a sparse one must be coalesced."""
        for name, parameter in self.parameters.items():
            grad = parameter.grad
            if grad is None:
                continue
            where: Any = grad.indices()[0] if grad.is_sparse else slice(None)
            values = grad.values() if grad.is_sparse else grad
            if len(values):
                parameter[where] -= self._change(self.state[name], where, values)

    def _change(self, state: dict[str, torch.Tensor], where: Any, grad: torch.Tensor) -> torch.Tensor:
        first, second = self.betas
        steps = state["steps"][where] + 1
        mean = state["exp_avg"][where] * first + (1 - first) * grad
        square = state["exp_avg_sq"][where] * second + (1 - second) * grad * grad
        state["steps"][where], state["exp_avg"][where], state["exp_avg_sq"][where] = steps, mean, square
        wide = steps.double().reshape(-1, *[1] * (grad.dim() - 1))
        rate = (self.rate / (1 - first**wide)).to(grad.dtype)
        return rate * mean / ((square / (1 - second**wide).to(grad.dtype)).sqrt() + self.eps)

    @torch.no_grad()
    def forget(self, name: str, rows: torch.Tensor) -> None:
        """Starts these rows of a parameter afresh: no moments, no steps."""
        for tensor in self.state[name].values():
            tensor[rows] = 0

    def state_dict(self) -> dict[str, Any]:
        """Moments and step counts, by parameter."""
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them back, into the tensors that are there."""
        for name, parts in self.state.items():
            for key, tensor in parts.items():
                tensor.copy_(state[name][key])
