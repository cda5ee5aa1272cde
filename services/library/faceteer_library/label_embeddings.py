"""The CLIP text embeddings of labels: nearest-neighbour search, by which words find labels that mean the same.

All of a text tower's embeddings point much the same way, so everything is compared centred: cos(e_i - m, q - m), m the
mean of the labels' embeddings.

Tens of thousands of labels x 1,280 are too much to read for one search. A projection onto the labels' own principal
axes chooses the candidates, and these are compared exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CANDIDATES = 500
_AXES = 96
# Below this many values all labels are compared exactly.
_SMALL = 4_000_000
_SAMPLE, _BLOCK = 4096, 4096
# With the postcards' text tower words that it knows lie at 0.99 or more from a label that means the same; names of
# things it never saw, and nonsense, mostly below 0.5 of any label.
_LEAST, _MOST = 0.5, 0.95


class Neighbours(NamedTuple):
    """Labels close in meaning, closest first.

    Attributes:
        rows: int64 [k], rows of the matrix.
        cosines: float32 [k], centred.
    """

    rows: np.ndarray
    cosines: np.ndarray


class LabelEmbeddings:
    """Embeddings of distinct labels.

    Args:
        embeds: float16 [n, d], each of norm 1, one a label.

    Attributes:
        floor: the least centred cosine that counts; whatever is farther from the words says nothing. Directions taken
            at random in k dimensions have cosines of standard deviation 1 / sqrt(k): the floor is three of these, at
            least 0.5 and at most 0.95, k being the dimensions that the labels really fill (their participation ratio).
    """

    def __init__(self, embeds: np.ndarray) -> None:
        self.embeds = embeds
        n, self.dim = embeds.shape
        self._mean = np.zeros(self.dim, np.float32)
        for start in range(0, n, _BLOCK):
            self._mean += embeds[start : start + _BLOCK].astype(np.float32).sum(0)
        self._mean /= max(n, 1)
        centred = self._centred(np.random.default_rng(0).permutation(n)[:_SAMPLE])
        self.floor = _floor(centred)
        self._axes: np.ndarray | None = None
        if embeds.size > _SMALL:
            self._axes = _principal_axes(centred, _AXES)
            self._screen = np.empty((n, _AXES), np.float32)
            for start in range(0, n, _BLOCK):
                rows = np.arange(start, min(start + _BLOCK, n))
                self._screen[rows] = self._centred(rows) @ self._axes

    def __len__(self) -> int:
        return len(self.embeds)

    def closest(self, query: np.ndarray, *, exactly: bool = False) -> Neighbours:
        """At most :data:`CANDIDATES` labels no farther than :attr:`floor`.

        Args:
            query: float32 [d], not zero; need not be normalised.
            exactly: compare every label, without screening.
        """
        centred = query / np.linalg.norm(query) - self._mean
        centred = np.asarray(centred / max(float(np.linalg.norm(centred)), 1e-12), np.float32)
        if self._axes is None or exactly:
            cosines = np.concatenate(
                [self._centred(np.arange(start, min(start + _BLOCK, len(self)))) @ centred
                 for start in range(0, len(self), _BLOCK)] or [np.empty(0, np.float32)]
            )  # fmt: skip
            rows = np.arange(len(self))
        else:
            screened = self._screen @ (centred @ self._axes)
            # Ascending, so that rows are read in the memory's own order.
            rows = np.sort(np.argpartition(-screened, CANDIDATES)[:CANDIDATES])
            cosines = self._centred(rows) @ centred
        order = np.argsort(-cosines, kind="stable")[:CANDIDATES]
        order = order[cosines[order] >= self.floor]
        return Neighbours(rows[order], cosines[order])

    def _centred(self, rows: np.ndarray) -> np.ndarray:
        """Float32 [rows, d], each of norm 1."""
        centred = self.embeds[rows].astype(np.float32) - self._mean
        centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
        return np.asarray(centred, np.float32)


def _floor(centred: np.ndarray) -> float:
    """The floor, from a sample of the labels. k = (sum l)^2 / sum l^2 over the eigenvalues l of their covariance."""
    some = centred[:1024]
    squares = float(np.square(some @ some.T).sum())
    k = len(some) ** 2 / max(squares, 1e-12) if squares > 0 else 0.0
    return float(np.clip(3 / np.sqrt(max(k, 1.0)), _LEAST, _MOST))


def _principal_axes(centred: np.ndarray, count: int) -> np.ndarray:
    """An orthonormal basis [d, count] of about the directions in which the rows vary most: two power iterations."""
    axes = np.random.default_rng(0).standard_normal((centred.shape[1], count)).astype(np.float32)
    for _ in range(3):
        axes, _ = np.linalg.qr(centred.T @ (centred @ axes))
    return np.asarray(axes, np.float32)
