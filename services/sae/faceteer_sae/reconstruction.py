"""How well the reconstructions of many embeddings match them: explained variance, mean squared error, cosine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from faceteer_sae.features import explained_variance

Floats = npt.NDArray[np.float32]


@dataclass
class Reconstruction:
    """Sums over the rows added so far, in float64, from which every figure follows; memory does not grow with the rows.

    Attributes:
        rows: how many.
        values: numbers in all rows.
        error: sum of |x - x_hat|^2.
        squares: sum of |x|^2.
        total: float64 [d], sum of x.
        cosines: sum of cos(x, x_hat).
    """

    rows: int = 0
    values: int = 0
    error: float = 0.0
    squares: float = 0.0
    total: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    cosines: float = 0.0

    def add(self, x: Floats, x_hat: Floats) -> Reconstruction:
        """Adds embeddings [m, d] and their reconstructions; returns itself."""
        wide, found = x.astype(np.float64), x_hat.astype(np.float64)
        square = np.square(wide).sum(1)
        self.rows += len(x)
        self.values += x.size
        self.error += float(np.square(wide - found).sum())
        self.squares += float(square.sum())
        self.total = self.total + wide.sum(0)
        lengths = np.sqrt(square * np.square(found).sum(1))
        self.cosines += float(((wide * found).sum(1) / np.maximum(lengths, 1e-12)).sum())
        return self

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """The mean embedding, float64 [d]."""
        return self.total / self.rows

    @property
    def squared_distance(self) -> float:
        """Sum of |x - mean|^2."""
        return max(self.squares - float(np.square(self.total).sum()) / self.rows, 0.0)

    @property
    def explained_variance(self) -> float:
        """See :func:`faceteer_sae.features.explained_variance`."""
        return explained_variance(self.error, self.squared_distance)

    @property
    def cosine(self) -> float:
        """Mean cos(x, x_hat)."""
        return self.cosines / self.rows

    @property
    def mse(self) -> float:
        """Mean squared error of one number of an embedding."""
        return self.error / self.values

    @property
    def mse_of_zero(self) -> float:
        """What :attr:`mse` would be if every reconstruction were zero."""
        return self.squares / self.values

    @property
    def mse_of_mean(self) -> float:
        """What :attr:`mse` would be if every reconstruction were the mean embedding."""
        return self.squared_distance / self.values
