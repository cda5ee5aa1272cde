"""How much of a known dictionary a trained decoder holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional


class Recovered(NamedTuple):
    """Of the true directions.

    Attributes:
        mean: mean over true directions of the largest cosine with any decoder row (Sharkey et al. 2022).
        share: of true directions whose largest cosine is above 0.9.
    """

    mean: float
    share: float


def recovered(W_dec: torch.Tensor, truth: torch.Tensor) -> Recovered:
    """Of decoder rows W_dec [n, d] and true directions [n_true, d], of any norm."""
    best = (functional.normalize(truth, dim=-1) @ functional.normalize(W_dec, dim=-1).T).amax(1)
    return Recovered(float(best.mean()), float((best > 0.9).float().mean()))
