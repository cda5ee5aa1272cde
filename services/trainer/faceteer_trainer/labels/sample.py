"""The pictures that labels are made from and the others that they are judged on, with what fires on each.

Which side a picture falls on depends on its number alone, so that a label which is made or
judged again later never sees the other side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from faceteer_sae.model import SparseAutoencoder
from scipy import sparse

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.library.encoding import BulkEncoder
from faceteer_trainer.library.tallies import lottery

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
# Share of the pictures that labels are made from; the rest judges them.
MAKING = 0.6


@dataclass(frozen=True)
class Side:
    """Some pictures.

    Attributes:
        rows: their numbers in the corpus, int64 [m].
        embeds: centred on the sample's mean and brought to norm 1, float32 [m, d]: a cosine with a text then says what
            tells a picture from others.
        acts: RAW activations, sparse columns [m, d_sae].
    """

    rows: Ints
    embeds: Floats
    acts: sparse.csc_matrix

    def fires(self, feature: int) -> tuple[Ints, Floats]:
        """Places of the pictures on which a feature fires, and its activations there."""
        part = slice(self.acts.indptr[feature], self.acts.indptr[feature + 1])
        return self.acts.indices[part].astype(np.int64), self.acts.data[part]


@dataclass(frozen=True)
class Sample:
    """Two sides of one sample, and the mean that was subtracted."""

    making: Side
    judging: Side
    mean: Floats


def take_sample(corpus: EmbeddingCorpus, sae: SparseAutoencoder, most: int, device: str = "cpu") -> Sample:
    """Up to ``most`` pictures, evenly over the corpus, encoded and split."""
    rows = np.unique(np.linspace(0, len(corpus) - 1, min(most, len(corpus))).astype(np.int64))
    encoder = BulkEncoder(sae, device)
    embeds = corpus.rows(rows)
    parts = []
    for start in range(0, len(rows), 4096):
        active = encoder.encode(embeds[start : start + 4096])
        shape = (len(active.indptr) - 1, sae.d_sae)
        parts.append(sparse.csr_matrix((active.values, active.indices, active.indptr), shape))
    acts = sparse.vstack(parts, format="csr")
    mean = embeds.mean(0)
    unit = embeds - mean
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    making = lottery(np.zeros(len(rows), np.int32), rows, seed=20_26) < MAKING

    def side(mask: npt.NDArray[np.bool_]) -> Side:
        return Side(rows[mask], unit[mask], acts[np.flatnonzero(mask)].tocsc())

    return Sample(side(making), side(~making), mean)
