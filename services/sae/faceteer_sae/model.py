"""The sparse autoencoder: embeddings to features and features to embeddings.

Knows nothing of edits, of the cache, or of how calls arrive.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from faceteer_sae.weights import SaeConfig, chunks, load_config, load_weights

# Rows of weights brought to float32 at a time: 8,192 of 1,280 values are 42 MB.
_ROWS = 8192
# float16 has no fast matrix product on CPUs: from this many embeddings on, converting blocks of rows that stay in the
# cache to float32 costs less than one float16 pass for each embedding.
_HALF_BATCH, _HALF_BLOCK = 4, 512
# Unit roundoff of the number type in which the screening runs.
_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class FeatureActivations(NamedTuple):
    """The features that fire on one embedding.

    Attributes:
        top_indices: int32 [l0], ascending.
        top_acts: float32 [l0], aligned with top_indices, all > 0.
        kth_pre_act: the k-th largest pre-activation where the architecture is topk, NaN otherwise. With it, whether
            one feature fires can be told from its own pre-activation.
    """

    top_indices: np.ndarray
    top_acts: np.ndarray
    kth_pre_act: float

    def at(self, indices: np.ndarray) -> np.ndarray:
        """Activations, float32 [m], of features [m]; 0 where one does not fire."""
        if len(self.top_indices) == 0:
            return np.zeros(len(indices), np.float32)
        where = np.minimum(np.searchsorted(self.top_indices, indices), len(self.top_indices) - 1)
        return np.where(self.top_indices[where] == indices, self.top_acts[where], np.float32(0))


class SparseAutoencoder:
    """``f = act(W_enc (x - b_pre) + b_enc)``, ``x_hat = W_dec f + b_dec``; b_pre is b_dec or zero.

    ``act`` of a pre-activation p_i, by architecture::

        standard    max(p_i, 0)
        topk        p_i if p_i > 0 and p_i >= the k-th largest of p, else 0  (equal ones all fire; Gao et al. 2024)
        batchtopk   p_i if p_i > max(threshold, 0), else 0                   (at inference; Bussmann et al. 2024)
        jumprelu    p_i if p_i > max(threshold_i, 0), else 0                 (Rajamanoharan et al. 2024)

    Encoding *screens* all features in the weights' own number type, which at batch 1 costs as much as reading W_enc
    once, and then computes the few pre-activations that could matter again, in float32, one dot product each. So a
    feature's activation is the same number whether it was found among all or asked for alone, whatever the batch, and
    the screening may be as coarse as its error bound is honest.

    Both matrices lie as [d_sae, d_in], so that a feature's encoder and decoder vectors are contiguous rows.
    """

    def __init__(self, config: SaeConfig, weights: dict[str, torch.Tensor], device: str = "cpu") -> None:
        """Takes weights in the shapes and under the names of docs/bundles.md; see :meth:`load`."""
        self.config = config
        self.architecture, self.d_in, self.d_sae, self.k = config.architecture, config.d_in, config.d_sae, config.k
        self._W_enc = weights["W_enc"].T.contiguous()
        self._W_dec = weights["W_dec"].contiguous()
        self.b_enc: np.ndarray = weights["b_enc"].float().numpy()
        self.b_dec: np.ndarray = weights["b_dec"].float().numpy()
        self.b_pre: np.ndarray = self.b_dec if config.apply_b_dec_to_input else np.zeros_like(self.b_dec)
        self.threshold: np.ndarray | None = None
        if self.architecture != "topk":
            given = weights.get("threshold", weights.get("topk_threshold", torch.zeros(())))
            self.threshold = np.broadcast_to(np.maximum(given.float().numpy(), np.float32(0)), (self.d_sae,))
        self._device = torch.device(device)
        # What is screened; shares the rows' memory on a CPU.
        self._screen_W = self._W_enc.to(self._device)
        self._screen_b = torch.from_numpy(self.b_enc).to(self._device)
        self._screen_threshold = (
            None if self.threshold is None else torch.from_numpy(self.threshold.copy()).to(self._device)
        )
        self._largest_norm = max(float(rows.float().norm(dim=1).max()) for rows in chunks(self._W_enc))

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> SparseAutoencoder:
        """Reads cfg.json and sae_weights.safetensors.

        Raises:
            BundleError: one sentence on what is wrong with which file.
        """
        config = load_config(directory)
        return cls(config, load_weights(directory, config), device)

    def encode(self, x: np.ndarray) -> list[FeatureActivations]:
        """The features that fire on each of N embeddings.

        Args:
            x: float32 [N, d_in], finite.
        """
        x_in = x - self.b_pre
        norms = np.linalg.norm(x_in.astype(np.float64), axis=1)
        rows, columns = self._candidates(x_in, self._screening_error(norms))
        bounds = np.searchsorted(rows, np.arange(len(x) + 1))
        return [self._settle(x_in[n], columns[bounds[n] : bounds[n + 1]]) for n in range(len(x))]

    def pre_acts(self, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Pre-activations, float32 [m], of m features on one embedding [d_in]: one dot product each."""
        return self._pre_acts(x - self.b_pre, indices)

    def activations(self, x: np.ndarray, indices: np.ndarray, kth_pre_act: float = np.nan) -> np.ndarray:
        """Activations, float32 [m], of m features on one embedding [d_in], without looking at the others.

        Args:
            x: float32 [d_in].
            indices: int [m].
            kth_pre_act: the k-th largest pre-activation on x; needed by topk only.
        """
        pre_acts = self.pre_acts(x, indices)
        return np.where(self._fires(pre_acts, indices, kth_pre_act), pre_acts, np.float32(0))

    def decode(self, indices: np.ndarray, activations: np.ndarray) -> np.ndarray:
        """``W_dec f + b_dec``, float32 [d_in], of activations [m] of features [m], the others being 0."""
        x_hat: np.ndarray = self.b_dec + self.combine(indices, activations)
        return x_hat

    def combine(self, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """``sum w_i d_i``, float32 [d_in], over features [m] with weights [m]."""
        total = np.zeros(self.d_in, np.float32)
        weights = np.asarray(weights, dtype=np.float32)
        for start in range(0, len(indices), _ROWS):
            part = slice(start, start + _ROWS)
            total += weights[part] @ self.directions(indices[part])
        return total

    def directions(self, indices: np.ndarray) -> np.ndarray:
        """Decoder vectors d_i of m features, float32 [m, d_in]."""
        return _take(self._W_dec, indices)

    # -- encoding --------------------------------------------------------------------------------

    def _screening_error(self, norms: np.ndarray) -> np.ndarray:
        """How far a screened pre-activation may be from the exact one, float32 [N], for inputs of these norms.

        Rounding x and rounding the result cost a unit roundoff of ``||x|| ||w||`` each (Cauchy-Schwarz), summing d
        products in float32 costs d of float32's (Higham 2002, section 3.1); half as much again for the bias.
        """
        relative = 2 * _ROUNDOFF[self._screen_W.dtype] + self.d_in * _ROUNDOFF[torch.float32]
        error: np.ndarray = 1.5 * relative * (norms * self._largest_norm + np.abs(self.b_enc).max())
        return error.astype(np.float32)

    def _candidates(self, x_in: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns, sorted, of all features that might fire (for topk: might be among the k largest)."""
        with torch.inference_mode():
            error_t = torch.from_numpy(error).to(self._device)[:, None]
            # Scaled by powers of two, which costs no accuracy, so that no input overflows float16.
            scale = np.exp2(np.ceil(np.log2(np.maximum(np.abs(x_in).max(axis=1), 1e-20)))).astype(np.float32)
            pre = self._screen(torch.from_numpy(x_in / scale[:, None]).to(self._device))
            pre *= torch.from_numpy(scale).to(self._device)[:, None]
            pre += self._screen_b
            if self._screen_threshold is None:
                kth = pre.topk(self.k, dim=1, sorted=True).values[:, -1:]
                mask = pre >= kth - 2 * error_t
            else:
                mask = pre > self._screen_threshold - error_t
            rows, columns = mask.nonzero(as_tuple=True)
            return rows.cpu().numpy(), columns.cpu().numpy()

    def _screen(self, x_in: torch.Tensor) -> torch.Tensor:
        """``x_in W_enc``, float32 [N, d_sae], as exactly as the weights' number type allows."""
        W = self._screen_W
        if W.dtype != torch.float16 or W.device.type != "cpu" or len(x_in) < _HALF_BATCH:
            return F.linear(x_in.to(W.dtype), W).float()
        pre = torch.empty(len(x_in), len(W))
        for start in range(0, len(W), _HALF_BLOCK):
            block = W[start : start + _HALF_BLOCK].float()
            pre[:, start : start + _HALF_BLOCK] = F.linear(x_in, block)
        return pre

    def _settle(self, x_in: np.ndarray, candidates: np.ndarray) -> FeatureActivations:
        """Exact pre-activations of the candidates, and which of them fire."""
        pre_acts = self._pre_acts(x_in, candidates)
        kth_pre_act = np.nan
        if self.architecture == "topk":
            kth_pre_act = float(np.partition(pre_acts, len(pre_acts) - self.k)[len(pre_acts) - self.k])
        fires = self._fires(pre_acts, candidates, kth_pre_act)
        return FeatureActivations(candidates[fires].astype(np.int32), pre_acts[fires], kth_pre_act)

    def _fires(self, pre_acts: np.ndarray, indices: np.ndarray, kth_pre_act: float) -> np.ndarray:
        if self.threshold is None:
            if np.isnan(kth_pre_act):
                raise ValueError("a topk SAE needs the k-th largest pre-activation")
            return (pre_acts > 0) & (pre_acts >= kth_pre_act)
        fires: np.ndarray = pre_acts > self.threshold[indices]
        return fires

    def _pre_acts(self, x_in: np.ndarray, indices: np.ndarray) -> np.ndarray:
        pre_acts = np.empty(len(indices), np.float32)
        x_in = np.ascontiguousarray(x_in)
        for start in range(0, len(indices), _ROWS):
            part = slice(start, start + _ROWS)
            # One dot product a row, so that a row's result does not depend on its neighbours.
            np.vecdot(_take(self._W_enc, indices[part]), x_in, out=pre_acts[part])
        pre_acts += self.b_enc[indices]
        return pre_acts


def _take(matrix: torch.Tensor, indices: np.ndarray) -> np.ndarray:
    """Rows of a CPU matrix as float32."""
    if matrix.dtype == torch.float32:
        rows: np.ndarray = matrix.numpy()[indices]
        return rows
    # By torch, which converts float16 six times faster than numpy.
    with torch.inference_mode():
        return matrix.index_select(0, torch.as_tensor(np.asarray(indices, dtype=np.int64))).float().numpy()
