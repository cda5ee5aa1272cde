"""How much of a corpus' embeddings an SAE keeps: the figures that a library's report opens with.

Looks at a sample of pictures; `evaluate-sae` measures the same and more on whole corpora.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.reconstruction import Reconstruction
from scipy import sparse

Floats = npt.NDArray[np.float32]
# The fact in a library's meta that holds the figures, as JSON.
SAE_FIGURES = "report.sae"
# Enough for three digits, and few enough that the features on them fit into memory at any width.
_MOST = 1024


def sae_figures(sae: SparseAutoencoder, embeds: Floats, acts: sparse.spmatrix) -> dict[str, float]:
    """Of up to 1,024 pictures: explained_variance, cosine of embedding and reconstruction, and l0.

    Args:
        sae: that gave the activations.
        embeds: float32 [m, d], raw.
        acts: RAW activations [m, d_sae].
    """
    rows = np.unique(np.linspace(0, len(embeds) - 1, min(_MOST, len(embeds))).astype(np.int64))
    x, f = embeds[rows], sparse.csr_matrix(acts)[rows]
    on = np.unique(f.indices)
    x_hat = sae.b_dec + f[:, on] @ sae.directions(on)
    fit = Reconstruction().add(x, x_hat)
    return {
        "explained_variance": fit.explained_variance,
        "cosine": fit.cosine,
        "l0": float((f > 0).sum() / len(rows)),
        "pictures": len(rows),
    }
