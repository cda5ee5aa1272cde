"""The sparse autoencoder: embeddings to features and features to embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.memory import require_memory

from faceteer_sae.rows import BLOCK as _ROWS
from faceteer_sae.rows import Rows
from faceteer_sae.screening import Screen, float_screen, int8_screen
from faceteer_sae.weights import WEIGHTS, SaeConfig, decoder_rows, encoder_rows, load_config, load_weights, screen_rows


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

    Encoding *screens* all features (:mod:`faceteer_sae.screening`), which at batch 1 costs as much as reading W_enc
    once, and then computes the few pre-activations that could matter again, in float32, one dot product each. So a
    feature's activation is the same number whether it was found among all or asked for alone, whatever the batch, and
    the screening may be as coarse as its error bound is honest.

    Both matrices are stored as [d_sae, d_in], so that a feature's encoder and decoder vectors are contiguous rows.
    """

    def __init__(
        self, config: SaeConfig, weights: dict[str, torch.Tensor], device: str = "cpu", screening: str = "auto"
    ) -> None:
        """Takes weights in the shapes and under the names of docs/bundles.md, in either layout; see :meth:`load`."""
        self.config = config
        self.architecture, self.d_in, self.d_sae, self.k = config.architecture, config.d_in, config.d_sae, config.k
        self._W_enc, self._W_dec = encoder_rows(weights), decoder_rows(weights)
        self.b_enc: np.ndarray = weights["b_enc"].float().numpy()
        self.b_dec: np.ndarray = weights["b_dec"].float().numpy()
        self.b_pre: np.ndarray = self.b_dec if config.apply_b_dec_to_input else np.zeros_like(self.b_dec)
        self.threshold: np.ndarray | None = None
        if self.architecture != "topk":
            given = weights.get("threshold", weights.get("topk_threshold", torch.zeros(())))
            self.threshold = np.broadcast_to(np.maximum(given.float().numpy(), np.float32(0)), (self.d_sae,))
            self._threshold_t = torch.from_numpy(self.threshold.copy()).to(device)
        self._screen = self._make_screen(weights, torch.device(device), screening)

    @classmethod
    def load(cls, directory: Path, device: str = "cpu", screening: str = "auto") -> SparseAutoencoder:
        """Reads cfg.json and sae_weights.safetensors.

        Args:
            directory: a bundle's ``sae/``.
            device: where all features are screened; single ones are always computed on the CPU.
            screening: "int8", a copy of the encoder at a byte a weight is read instead of it (half of float16's time on
                a CPU), from the file or made in memory; "weights", the weights themselves; "auto", int8 where the file
                holds the copy.

        Raises:
            BundleError: one sentence on what is wrong with which file, or the device is not there.
        """
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise BundleError(
                f"device {device!r} was asked for, but this machine has no CUDA GPU; set FACETEER_DEVICE=cpu"
            )
        config = load_config(directory)
        require_memory(str(directory), _memory_needed(directory, config, screening), "use weights in float16 or int8")
        return cls(config, load_weights(directory, config), device, screening)

    def encode(self, x: np.ndarray) -> list[FeatureActivations]:
        """The features that fire on each of N embeddings.

        Args:
            x: float32 [N, d_in], finite.
        """
        x_in = x - self.b_pre
        rows, columns = self._candidates(x_in)
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
        return self._W_dec.take(indices)

    @property
    def fires_by_rank(self) -> bool:
        """Whether a feature's activation depends on all others (topk): then it takes a full pass to know even one."""
        return self.threshold is None

    @property
    def encoder_rows(self) -> Rows:
        """The encoder's vectors, [d_sae, d_in]."""
        return self._W_enc

    @property
    def decoder_rows(self) -> Rows:
        """The decoder's vectors d_i, [d_sae, d_in]."""
        return self._W_dec

    # -- encoding --------------------------------------------------------------------------------

    def _make_screen(self, weights: dict[str, torch.Tensor], device: torch.device, screening: str) -> Screen:
        copy = screen_rows(weights)
        quantised = self._W_enc.scales is not None
        # A GPU's int8 product wants larger batches than one; its float16 is fast enough.
        if device.type == "cpu" and (quantised or screening == "int8" or (screening == "auto" and copy is not None)):
            return int8_screen(self._W_enc, self.b_enc, None if quantised else copy)
        return float_screen(self._W_enc, self.b_enc, device)

    def _candidates(self, x_in: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns, sorted, of all features that might fire (for topk: might be among the k largest)."""
        with torch.inference_mode():
            pre, error = self._screen(x_in)
            if self.threshold is None:
                # No fewer than k features reach the k-th largest of the lower bounds.
                least = (pre - error).topk(self.k, dim=1, sorted=True).values[:, -1:]
            else:
                least = self._threshold_t
            rows, columns = (pre >= least - error).nonzero(as_tuple=True)
            return rows.cpu().numpy(), columns.cpu().numpy()

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
            np.vecdot(self._W_enc.take(indices[part]), x_in, out=pre_acts[part])
        pre_acts += self.b_enc[indices]
        return pre_acts


def _memory_needed(directory: Path, config: SaeConfig, screening: str) -> int:
    """Bytes at the largest moment: the file's pages, what is turned round in memory, an int8 copy if one is made."""
    path = directory / WEIGHTS
    size = path.stat().st_size if path.exists() else 0
    turned = size // 2 if config.layout == "saelens" else 0
    return size + turned + (config.d_sae * config.d_in if screening == "int8" else 0)
