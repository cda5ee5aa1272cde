"""How unlike the corpus an embedding is: the score behind the warning about pictures that a bundle does not understand.

The score is learnt from the corpus alone; no picture of another kind takes part in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Of the corpus' own pictures one in two hundred is warned about: too few to annoy, enough that the limit is an estimate
# and not one picture.
QUANTILE = 0.995
# Heavy compression raises the share that is not explained but brings an embedding nearer to the mean; pictures of
# another kind raise the first and seldom lower the second. Half of its weight forgives the one and keeps the other:
# measured in docs/log.md.
DISTANCE_WEIGHT = 0.5
# Half of these pictures are two hundred, the fewest from which a rate of one in two hundred can be estimated.
FEWEST = 400
# Added to the covariance, as a share of its mean variance: directions in which the corpus does not vary at all would
# otherwise count without bound.
_RIDGE = 1e-4
# Share of the variance that float32 rounding leaves even of a fully explained embedding.
_LEAST_FVU = 1e-9


@dataclass(frozen=True)
class Novelty:
    """``score(x) = z(log FVU(x)) + 0.5 z(||W (x - mean)||)`` with ``z(v) = (v - p50) / (p995 - p50)`` over the corpus.

    FVU, the fraction of variance unexplained, is ``||x - x_hat||^2 / ||x - mean||^2``; W whitens, so that the second
    term is Mahalanobis' distance.

    Attributes:
        whitening: W, float32 [d_in, d_in].
        log_fvu: float32 [2], the corpus' median and 99.5th percentile of log FVU.
        distance: float32 [2], the same of the distance.
        limit: float32 [1], the corpus' 99.5th percentile of the score: above it a picture is unlike the corpus.
    """

    whitening: np.ndarray
    log_fvu: np.ndarray
    distance: np.ndarray
    limit: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray, squared_error: np.ndarray, mean: np.ndarray) -> Novelty | None:
        """Learns it from a corpus; None from fewer than :data:`FEWEST` pictures, or where nothing varies.

        Args:
            x: float32 [m, d_in], from all over the corpus.
            squared_error: [m], ||x - x_hat||^2.
            mean: [d_in], the corpus' mean embedding.
        """
        if len(x) < FEWEST:
            return None
        spread = x.astype(np.float64) - mean
        # Axes from one half, percentiles from the other: distances along axes that were fitted to the very same
        # embeddings are too short, and every fresh picture would look far away.
        fitted, judged = spread[::2], spread[1::2]
        covariance = fitted.T @ fitted / len(fitted)
        variance = float(np.trace(covariance)) / len(covariance)
        if not variance > 0:
            return None
        values, vectors = np.linalg.eigh(covariance)
        whitening = (vectors / np.sqrt(np.maximum(values, 0) + _RIDGE * variance)).T
        log_fvu = _log_fvu(squared_error[1::2], np.square(judged).sum(1))
        distance = np.linalg.norm(judged @ whitening.T, axis=1)
        marks = [np.quantile(of, (0.5, QUANTILE)).astype(np.float32) for of in (log_fvu, distance)]
        scores = _z(log_fvu, marks[0]) + DISTANCE_WEIGHT * _z(distance, marks[1])
        limit = np.quantile(scores, [QUANTILE]).astype(np.float32)
        return cls(whitening.astype(np.float32), marks[0], marks[1], limit)

    def score(self, squared_error: float, spread: np.ndarray) -> float:
        """Of one embedding: ||x - x_hat||^2, and x - mean, [d_in]."""
        log_fvu = _log_fvu(np.array([squared_error]), np.array([spread @ spread]))
        distance = np.array([np.linalg.norm(self.whitening @ spread.astype(np.float32))])
        return float((_z(log_fvu, self.log_fvu) + DISTANCE_WEIGHT * _z(distance, self.distance))[0])

    @property
    def usual_explained_variance(self) -> float:
        """What the corpus' median picture has."""
        return 1.0 - float(np.exp(self.log_fvu[0]))


def _log_fvu(squared_error: np.ndarray, squared_distance: np.ndarray) -> np.ndarray:
    share: np.ndarray = np.log(np.maximum(squared_error / np.maximum(squared_distance, 1e-30), _LEAST_FVU))
    return share


def _z(values: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """0 at the corpus' median, 1 at its 99.5th percentile."""
    z: np.ndarray = (values - float(marks[0])) / max(float(marks[1] - marks[0]), 1e-6)
    return z
