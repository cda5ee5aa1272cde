"""Which latents fire: all pre-activations are looked at once, in chunks, without a gradient.

Memory depends on the chunk and the pairs that are kept, never on batch x width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from faceteer_trainer.sae.kernels import Pairs

# Pre-activations held at once: 64 MB in float32.
_CHUNK = 1 << 24


def pre_act_chunks(
    x_in: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    bf16: bool = False,
    latents: torch.Tensor | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """(number of the first latent, float32 [b, <= chunk]) over all n latents, or over `latents` only.

    With `bf16` the product is bfloat16's: good enough to choose by, and half the time where the machine knows it.
    """
    total = len(W_enc) if latents is None else len(latents)
    size = max(1, _CHUNK // max(1, len(x_in)))
    low = x_in.bfloat16() if bf16 else x_in
    for first in range(0, total, size):
        where = slice(first, first + size) if latents is None else latents[first : first + size]
        rows = W_enc[where]
        pre = (low @ rows.bfloat16().T).float() if bf16 else low @ rows.T
        yield first, pre.add_(b_enc[where])


@torch.no_grad()
def select_topk(
    x_in: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, k: int, bf16: bool = False,
    latents: torch.Tensor | None = None,
) -> Pairs:  # fmt: skip
    """The k largest positive pre-activations of each row of x_in [b, d], among all latents or `latents` only."""
    best: torch.Tensor | None = None
    where = torch.empty(0, dtype=torch.int64)
    for first, pre in pre_act_chunks(x_in, W_enc, b_enc, bf16, latents):
        top = pre.topk(min(k, pre.shape[1]), dim=1, sorted=False)
        if best is None:
            best, where = top.values, top.indices + first
            continue
        both, numbers = torch.cat([best, top.values], 1), torch.cat([where, top.indices + first], 1)
        kept = both.topk(min(k, both.shape[1]), dim=1, sorted=False)
        best, where = kept.values, numbers.gather(1, kept.indices)
    assert best is not None
    rows, columns = (best > 0).nonzero(as_tuple=True)
    found = where[rows, columns]
    return Pairs(rows, found if latents is None else latents[found])


@torch.no_grad()
def select_batch_topk(
    x_in: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, kept: int, bf16: bool = False
) -> tuple[Pairs, torch.Tensor]:
    """The `kept` largest positive pre-activations of the whole batch [b, d], and the least of them (0-d)."""
    values = x_in.new_empty(0)
    rows = torch.empty(0, dtype=torch.int64, device=x_in.device)
    latents = rows
    for first, pre in pre_act_chunks(x_in, W_enc, b_enc, bf16):
        flat = pre.flatten()
        if len(values) == kept:  # only what beats the least so far is looked at again
            places = (flat > values.min()).nonzero()[:, 0]
        else:
            places = flat.topk(min(kept, len(flat)), sorted=False).indices
        values = torch.cat([values, flat[places]])
        rows = torch.cat([rows, places // pre.shape[1]])
        latents = torch.cat([latents, places % pre.shape[1] + first])
        if len(values) > kept:
            top = values.topk(kept, sorted=False).indices
            values, rows, latents = values[top], rows[top], latents[top]
    positive = values > 0
    values, rows, latents = values[positive], rows[positive], latents[positive]
    order = (rows * len(W_enc) + latents).argsort()
    least = values.min() if len(values) else values.new_zeros(())
    return Pairs(rows[order], latents[order]), least
