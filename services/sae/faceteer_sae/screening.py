"""Which features might fire: all pre-activations at once, roughly, each with a bound on its error.

What it lets through is recomputed, exactly, one dot product each.

A screen answers ``pre`` float32 [N, d_sae] and ``error`` float32, [N, 1] or [N, d_sae]: the exact pre-activation lies
within ``pre ± error``. The bounds are rigorous (Cauchy-Schwarz), so a screen may be as coarse as it likes and never
loses a feature; a coarse one only lets more through.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from faceteer_sae.rows import Rows, quantised

# float16 has no fast matrix product on CPUs: from this many embeddings on, converting blocks of rows that stay in the
# cache to float32 costs less than one float16 pass for each embedding.
_HALF_BATCH, _HALF_BLOCK = 4, 512
# Unit roundoff of the number type in which the screening runs.
_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Screen(Protocol):
    """A quick look at all features."""

    def __call__(self, x_in: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """``x_in W_enc + b_enc`` float32 [N, d_sae], roughly, and how far each may be off; x_in float32 [N, d_in]."""
        ...


class FloatScreen:
    """The product in a float type: at batch 1 it costs as much as reading W_enc once."""

    def __init__(self, W: torch.Tensor, b_enc: np.ndarray, largest_norm: float) -> None:
        """W: float rows [d_sae, d_in] on the device where the product runs; largest_norm: of its rows."""
        self._W, self._b = W, torch.from_numpy(b_enc).to(W.device)
        self._largest_norm, self._largest_bias = largest_norm, float(np.abs(b_enc).max())

    def __call__(self, x_in: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._W.device
        # Scaled by powers of two, which costs no accuracy, so that no input overflows float16.
        scale = np.exp2(np.ceil(np.log2(np.maximum(np.abs(x_in).max(axis=1), 1e-20)))).astype(np.float32)[:, None]
        pre = self._product(torch.from_numpy(x_in / scale).to(device))
        pre *= torch.from_numpy(scale).to(device)
        pre += self._b
        return pre, torch.from_numpy(self._error(x_in)).to(device)

    def _error(self, x_in: np.ndarray) -> np.ndarray:
        """[N, 1]. Rounding x and rounding the result cost a unit roundoff of ``||x|| ||w||`` each (Cauchy-Schwarz),
        summing d products in float32 costs d of float32's (Higham 2002, section 3.1); half as much again for the bias.
        """
        norms = np.linalg.norm(x_in.astype(np.float64), axis=1, keepdims=True)
        relative = 2 * _ROUNDOFF[self._W.dtype] + x_in.shape[1] * _ROUNDOFF[torch.float32]
        error: np.ndarray = 1.5 * relative * (norms * self._largest_norm + self._largest_bias)
        return error.astype(np.float32)

    def _product(self, x_in: torch.Tensor) -> torch.Tensor:
        W = self._W
        if W.dtype != torch.float16 or W.device.type != "cpu" or len(x_in) < _HALF_BATCH:
            return F.linear(x_in.to(W.dtype), W).float()
        pre = torch.empty(len(x_in), len(W))
        for start in range(0, len(W), _HALF_BLOCK):
            pre[:, start : start + _HALF_BLOCK] = F.linear(x_in, W[start : start + _HALF_BLOCK].float())
        return pre


class Int8Screen:
    """The product in int8 with exact int32 sums: half of float16's bytes to read.

    With q_i the int8 row of feature i, s_i its scale, and xq, sx the same of x::

        |x w_i - (sx xq)(s_i q_i)|  <=  ||x - sx xq|| ||w_i||  +  ||sx xq|| ||w_i - s_i q_i||

    Both norms of each row are known, so common rows are bounded far more tightly than the worst one.
    """

    def __init__(
        self, q: torch.Tensor, scales: np.ndarray, norms: np.ndarray, residuals: np.ndarray, b_enc: np.ndarray
    ) -> None:
        """q: int8 [d_sae, d_in] on the CPU; scales s_i, norms ||w_i||, residuals ||w_i - s_i q_i||: float32 [d_sae]."""
        self._q = q
        self._scales, self._b = torch.from_numpy(scales), torch.from_numpy(b_enc)
        # Slightly larger than the true values: they were rounded to float32, and the sums of these terms will be too.
        slack = np.float32(1 + 1e-5)
        self._norms, self._residuals = torch.from_numpy(norms * slack), torch.from_numpy(residuals * slack)
        self._rounding = torch.from_numpy((8 * 2.0**-24) * np.abs(b_enc) + np.float32(1e-30))

    def __call__(self, x_in: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        sx = np.maximum(np.abs(x_in).max(axis=1, keepdims=True) / 127, 1e-30).astype(np.float32)
        xq = np.clip(np.rint(x_in / sx), -127, 127)
        rounded = xq * sx.astype(np.float64)
        off = np.linalg.norm(x_in - rounded, axis=1, keepdims=True).astype(np.float32)
        length = np.linalg.norm(rounded, axis=1, keepdims=True).astype(np.float32)
        pre = torch._int_mm(torch.from_numpy(xq.astype(np.int8)), self._q.t()).float()
        pre *= self._scales
        pre *= torch.from_numpy(sx)
        pre += self._b
        error = torch.from_numpy(off + (x_in.shape[1] + 8) * 2.0**-24 * length) * self._norms
        error += torch.from_numpy(length) * self._residuals
        error += self._rounding
        return pre, error


def float_screen(rows: Rows, b_enc: np.ndarray, device: torch.device) -> FloatScreen:
    """A screen in the rows' own number type; int8 rows become float16 on a GPU."""
    largest = max(float(block.norm(dim=1).max()) for block in rows.blocks())
    if rows.scales is None:
        return FloatScreen(rows.values.to(device), b_enc, largest)
    W = torch.cat([block.to(device, torch.float16) for block in rows.blocks()])
    return FloatScreen(W, b_enc, largest * (1 + 2.0**-10))


def int8_screen(rows: Rows, b_enc: np.ndarray, copy: Rows | None = None) -> Int8Screen:
    """A screen over int8 rows: the rows themselves where they are int8, else a ``copy`` of them, made here if None."""
    if copy is None:
        copy = rows if rows.scales is not None else _int8_copy(rows)
    # Into preallocated arrays: small results kept between large temporaries would hold the heap open.
    norms, residuals, start = torch.empty(len(rows)), torch.empty(len(rows)), 0
    for exact, rounded in zip(rows.blocks(), copy.blocks(), strict=True):
        part = slice(start, start + len(exact))
        norms[part] = exact.norm(dim=1)
        residuals[part] = rounded.sub_(exact).norm(dim=1)
        start = part.stop
    assert copy.scales is not None
    return Int8Screen(copy.values, copy.scales, norms.numpy(), residuals.numpy(), b_enc)


def _int8_copy(rows: Rows) -> Rows:
    parts = [quantised(block) for block in rows.blocks()]
    return Rows(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]).numpy())
