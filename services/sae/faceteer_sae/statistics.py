"""What the SAE did on a corpus: the one reader and writer of feature_statistics.safetensors and of cfg.json's
embedding_statistics.

    feature_statistics.safetensors      how often each feature fires, how strongly, and its rivals; the mean embedding,
                                        and what tells an embedding unlike the corpus'
    cfg.json metadata                   embedding_statistics: what norm and L0 are usual, for the input gate
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.files import whole_file
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from faceteer_sae.novelty import Novelty

FILE = "feature_statistics.safetensors"
_NOVELTY = "novelty."
_QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}


@dataclass(frozen=True)
class FeatureStatistics:
    """One entry a feature, d_sae of them.

    Attributes:
        firing_share: float32 [d_sae], the share of the corpus on which the feature fires.
        p99: float32 [d_sae], 99th percentile of its activation where it fires: 1.0 in SCALED units. 0: it never fired.
        rivals_offsets: int64 [d_sae + 1]; the rivals of i are rivals_indices[offsets[i]:offsets[i + 1]].
        rivals_indices: int32.
        embedding_mean: float32 [d_in], the corpus' mean embedding, or None where the file does not say.
        novelty: what tells an embedding unlike the corpus', or None where the file does not say; its arrays lie in the
            file as ``novelty.whitening`` and so on. Needs embedding_mean.
    """

    firing_share: np.ndarray
    p99: np.ndarray
    rivals_offsets: np.ndarray
    rivals_indices: np.ndarray
    embedding_mean: np.ndarray | None = None
    novelty: Novelty | None = None

    def rivals(self, index: int) -> np.ndarray:
        """A feature's rivals, int32: see :mod:`faceteer_sae.rivals`."""
        return self.rivals_indices[self.rivals_offsets[index] : self.rivals_offsets[index + 1]]

    def scaled(self, indices: np.ndarray, activations: np.ndarray) -> np.ndarray:
        """RAW activations [m] of features [m] in SCALED units, float32; 0 for features that never fired."""
        p99 = self.p99[indices]
        scaled = np.zeros(len(p99), np.float32)
        np.divide(activations, p99, out=scaled, where=p99 > 0)
        return scaled


def load_statistics(directory: Path, d_in: int, d_sae: int) -> FeatureStatistics | None:
    """Reads and checks feature_statistics.safetensors; None where the bundle has none.

    Raises:
        BundleError: an array is missing, misshapen, not finite, or points outside.
    """
    path = directory / FILE
    if not path.exists():
        return None
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise BundleError(f"{path}: not a readable safetensors file ({error})") from None

    def array(name: str, dtype: type[np.generic], shape: tuple[int | None, ...]) -> np.ndarray:
        if name not in arrays:
            raise BundleError(f"{path}: {name!r} is missing")
        found = arrays[name]
        if len(found.shape) != len(shape) or any(
            w is not None and w != n for w, n in zip(shape, found.shape, strict=True)
        ):
            raise BundleError(f"{path}: {name!r} has shape {list(found.shape)}, not {list(shape)}")
        if not np.isfinite(found).all():
            raise BundleError(f"{path}: {name!r} holds values that are not finite")
        return np.ascontiguousarray(found, dtype=dtype)

    p99 = array("p99", np.float32, (d_sae,))
    offsets = array("rivals_offsets", np.int64, (d_sae + 1,))
    rivals = array("rivals_indices", np.int32, (None,))
    if (p99 < 0).any():
        raise BundleError(f"{path}: 'p99' holds negative activations")
    if offsets[0] != 0 or offsets[-1] != len(rivals) or (np.diff(offsets) < 0).any():
        raise BundleError(f"{path}: 'rivals_offsets' does not divide 'rivals_indices' into {d_sae} rows")
    if len(rivals) and (rivals.min() < 0 or rivals.max() >= d_sae):
        raise BundleError(f"{path}: 'rivals_indices' names features outside [0, {d_sae})")
    mean = array("embedding_mean", np.float32, (d_in,)) if "embedding_mean" in arrays else None
    novelty = None
    if any(name.startswith(_NOVELTY) for name in arrays):
        if mean is None:
            raise BundleError(f"{path}: 'embedding_mean' is missing, which {_NOVELTY}* needs")
        shapes = {"whitening": (d_in, d_in), "log_fvu": (2,), "distance": (2,), "limit": (1,)}
        novelty = Novelty(**{name: array(_NOVELTY + name, np.float32, shape) for name, shape in shapes.items()})
    return FeatureStatistics(array("firing_share", np.float32, (d_sae,)), p99, offsets, rivals, mean, novelty)


def save_statistics(directory: Path, statistics: FeatureStatistics) -> None:
    """Writes feature_statistics.safetensors, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    arrays = {
        field.name: array
        for field in fields(statistics)
        if isinstance(array := getattr(statistics, field.name), np.ndarray)
    }
    if statistics.novelty is not None:
        arrays |= {_NOVELTY + name: array for name, array in vars(statistics.novelty).items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        with whole_file(directory / FILE) as part:
            save_file(arrays, part)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(directory / FILE)) from None


def embedding_statistics(norms: np.ndarray, l0: np.ndarray) -> dict[str, dict[str, float]]:
    """What cfg.json's ``metadata.embedding_statistics`` holds: percentiles of embeddings' norms [m] and of L0 [m]."""
    return {
        name: {percentile: float(np.quantile(values, q)) for percentile, q in _QUANTILES.items()}
        for name, values in (("norm", norms), ("l0", l0))
    }
