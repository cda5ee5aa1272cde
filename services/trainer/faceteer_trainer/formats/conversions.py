"""What the formats' modules share: the same SAE in other terms, and checks of what a file held."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from faceteer_sae.weights import SaeWeights

from faceteer_trainer.errors import JobError

# Rows turned to float64 together: 42 MB of 1,280 values.
_ROWS = 4096
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def with_input_shift(sae: SaeWeights, apply_b_dec_to_input: bool) -> SaeWeights:
    """The same function, b_dec subtracted from the input or not: W (x - b_dec) + b_enc = W x + (b_enc - W b_dec)."""
    if apply_b_dec_to_input == sae.apply_b_dec_to_input:
        return sae
    b_dec = sae.b_dec.double()
    shift = torch.cat([rows.double() @ b_dec for rows in sae.W_enc.split(_ROWS)]).float()
    b_enc = sae.b_enc.float() + (shift if apply_b_dec_to_input else -shift)
    return replace(sae, b_enc=b_enc, apply_b_dec_to_input=apply_b_dec_to_input)


def unit_rows(sae: SaeWeights) -> SaeWeights:
    """With each scale moved from the decoder vector into the activation, ``f_i ||d_i||``: rows of norm 1."""
    norms = sae.W_dec.float().norm(dim=1).clamp_min(1e-12)
    threshold = sae.threshold
    if sae.architecture == "jumprelu" and threshold is not None:
        threshold = threshold.float() * norms
    return replace(
        sae,
        W_enc=sae.W_enc.float() * norms[:, None],
        b_enc=sae.b_enc.float() * norms,
        W_dec=sae.W_dec.float() / norms[:, None],
        threshold=threshold,
    )


def of_raw_input(sae: SaeWeights, scale: float) -> SaeWeights:
    """The same SAE for x, where it was trained on ``scale x``: activations stay, reconstructions are of x.

    W (scale x - b_dec) = scale W (x - b_dec / scale), so W_enc grows by the scale, W_dec and b_dec shrink by it.
    """
    return replace(sae, W_enc=sae.W_enc.float() * scale, W_dec=sae.W_dec.float() / scale,
                   b_dec=sae.b_dec.float() / scale)  # fmt: skip


def checked(sae: SaeWeights, where: Path) -> SaeWeights:
    """The SAE itself.

    Raises:
        JobError: shapes contradict each other, a value is not finite, or a tensor holds no floating-point numbers.
    """
    if sae.W_enc.ndim != 2 or 0 in sae.W_enc.shape:
        raise JobError(f"{where}: W_enc has shape {list(sae.W_enc.shape)}, but must be a matrix")
    d_sae, d_in = sae.W_enc.shape
    wanted: dict[str, tuple[int, ...]] = {"W_enc": (d_sae, d_in), "W_dec": (d_sae, d_in), "b_enc": (d_sae,)}
    wanted["b_dec"] = (d_in,)
    if sae.threshold is not None:
        wanted["threshold"] = (d_sae,) if sae.architecture == "jumprelu" else ()
    for name, shape in wanted.items():
        tensor = getattr(sae, name)
        if tuple(tensor.shape) != shape:
            raise JobError(f"{where}: {name} has shape {list(tensor.shape)}, not {list(shape)}")
        if tensor.dtype not in _FLOATS:
            raise JobError(f"{where}: {name} is {tensor.dtype}; convert it to float32 or float16")
    if sae.architecture in ("topk", "batchtopk") and not 1 <= sae.k <= d_sae:
        raise JobError(f"{where}: k is {sae.k}, but must be 1 to {d_sae}")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        tensor = getattr(sae, name)
        # Block by block: a matrix that is transposed in its file is not copied for this.
        parts = () if tensor is None else tensor.split(_ROWS) if tensor.ndim else (tensor,)
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise JobError(f"{where}: {name} holds NaN or infinite values")
    return sae


def turned(matrix: torch.Tensor, where: Path) -> torch.Tensor:
    """A matrix with rows for columns, without a copy. Raises JobError where it is no matrix."""
    if matrix.ndim != 2:
        raise JobError(f"{where}: a tensor of shape {list(matrix.shape)} stands where a matrix must")
    return matrix.T


def whole_number(value: Any, where: Path, name: str) -> int:
    """A count that a file gives as a number or a tensor of one. Raises JobError."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise JobError(f"{where}: {name} must be a number, not {value!r}")
    return round(value)


def take(tensors: Mapping[str, Any], where: Path, *names: str) -> list[torch.Tensor]:
    """Exactly these tensors, in order.

    Raises:
        JobError: one is missing or no tensor, or there are others.
    """
    if lacking := [name for name in names if name not in tensors]:
        raise JobError(f"{where}: {lacking[0]!r} is missing; it must hold {', '.join(names)}")
    if extra := sorted(tensors.keys() - set(names)):
        raise JobError(f"{where}: {extra[0]!r} does not belong there; it must hold {', '.join(names)}")
    for name in names:
        if not isinstance(tensors[name], torch.Tensor):
            raise JobError(f"{where}: {name!r} is no tensor but {type(tensors[name]).__name__}")
    return [tensors[name] for name in names]
