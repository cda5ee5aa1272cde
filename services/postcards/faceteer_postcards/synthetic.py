"""A synthetic corpus of any size: sparse mixtures of a known dictionary, so that what a trainer finds can be judged.

    embeds = acts @ dictionary + noise,     acts [rows, n_true] sparse, dictionary [n_true, d] of unit norm

A block of rows depends only on the settings and its own number, so that any part can be made again, in any order, and a
killed run can resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from faceteer_trainer.corpus.shards import CorpusCard, Shard, map_embeds, shard_name, write_embeds
from faceteer_trainer.errors import JobError
from torch.nn import functional

BLOCK = 4096
# About that of CLIP embeddings, which are not normalised (ViT-bigG-14: 35 to 45).
NORM = 40.0
NOISE = 0.05
# The commonest feature fires this many times as often as the rarest.
_SPREAD = 1000.0
_COMMONEST = 0.5
_LOG_SIGMA = 0.3


class Activations(NamedTuple):
    """True activations [rows, n_true] in compressed sparse rows, indices rising within a row.

    Attributes:
        indptr: int64 [rows + 1]; row r's entries are indptr[r] to indptr[r + 1].
        indices: int64 [entries], numbers of true features.
        values: float32 [entries], all above 0.
        n_true: number of columns.
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    n_true: int

    def dense(self) -> npt.NDArray[np.float32]:
        """float32 [rows, n_true]: for small ones."""
        full = np.zeros((len(self.indptr) - 1, self.n_true), np.float32)
        full[np.repeat(np.arange(len(full)), np.diff(self.indptr)), self.indices] = self.values
        return full


@dataclass(frozen=True)
class SparseMixtures:
    """A corpus that is generated, block by block.

    Feature 0 is the commonest; the chance to fire falls by a factor of 1,000 to the last, evenly in its logarithm. It
    sums up to about mean_active. Features fire independently of each other, except for `together` and `rivals`.
    Values are log-normal, and such that a row's norm is about 40; the noise's norm is 5 % of that.

    Attributes:
        n_true: features in the dictionary.
        d: length of an embedding.
        mean_active: features that fire in a row, in the mean.
        seed: another seed, another corpus.
    """

    n_true: int
    d: int
    mean_active: float = 16.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_true < 16 or self.d < 1 or self.seed < 0:
            raise JobError("a synthetic corpus needs n_true >= 16, d >= 1 and seed >= 0")
        if not 0 < self.mean_active <= self.n_true / 8:
            raise JobError(f"mean_active is {self.mean_active}; it must be above 0 and at most n_true / 8")

    @property
    def encoder_revision(self) -> str:
        """Takes the place of the encoder's revision: rows of other settings are refused by it."""
        return f"synthetic-{self.n_true}x{self.d}-{self.mean_active:g}-{self.seed}"

    @cached_property
    def dictionary(self) -> npt.NDArray[np.float32]:
        """float32 [n_true, d], each row of unit norm, drawn evenly from the sphere."""
        rows = self._rng(0).standard_normal((self.n_true, self.d), dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows

    @property
    def _pairs(self) -> int:
        return max(1, min(32, self.n_true // 64))

    @property
    def together(self) -> npt.NDArray[np.int64]:
        """Pairs [k, 2]: the second fires in nine of ten rows in which the first does, and in no other."""
        first = 2 * self._pairs + np.arange(self._pairs)
        return np.stack([first, self.n_true - 1 - np.arange(self._pairs)], axis=1)

    @property
    def rivals(self) -> npt.NDArray[np.int64]:
        """Pairs [k, 2] of the commonest features that never fire in the same row: (0, 1), (2, 3) ..."""
        return np.arange(2 * self._pairs).reshape(-1, 2)

    @cached_property
    def firing_share(self) -> npt.NDArray[np.float64]:
        """Share of rows [n_true] in which each feature fires, as expected."""
        share = self._independent.copy()
        # Where both fire on one row, one of the two is kept at random.
        first, second = self.rivals.T
        both = share[first] * share[second] / 2
        share[first] -= both
        share[second] -= both
        share[self.together[:, 1]] = 0.9 * share[self.together[:, 0]]
        return share

    def block(self, index: int) -> tuple[npt.NDArray[np.float32], Activations]:
        """Rows index * 4096 to index * 4096 + 4095.

        Returns:
            Embeddings float32 [4096, d], and the true activations that they were mixed from.
        """
        rng = self._rng(1 + index)
        acts = self._activations(rng)
        embeds = functional.embedding_bag(
            torch.from_numpy(acts.indices),
            torch.from_numpy(self.dictionary),
            torch.from_numpy(acts.indptr),
            mode="sum",
            per_sample_weights=torch.from_numpy(acts.values),
            include_last_offset=True,
        ).numpy()
        noise = rng.standard_normal(embeds.shape, dtype=np.float32)
        noise *= NORM * NOISE / math.sqrt(self.d)
        embeds += noise
        return embeds, acts

    def blocks(self, rows: int) -> Iterator[tuple[npt.NDArray[np.float32], int]]:
        """Embeddings of the first `rows` rows, block by block, with the number of each block's first row."""
        for first in range(0, rows, BLOCK):
            yield self.block(first // BLOCK)[0][: rows - first], first

    def write(self, directory: Path | str, rows: int, dtype: str = "float16", *, shard_size: int = 8 * BLOCK) -> None:
        """Write the first `rows` rows as a corpus that EmbeddingCorpus opens, without pictures; shards there are kept.

        Args:
            directory: made where it does not exist.
            rows: how many; memory follows shard_size, not this.
            dtype: float16 or float32.
            shard_size: rows a shard, a multiple of 4,096.

        Raises:
            JobError: shard_size is no multiple of 4,096, the directory holds other shards, or the disk is full.
        """
        if shard_size % BLOCK or shard_size < BLOCK:
            raise JobError(f"shard_size is {shard_size}; make it a multiple of {BLOCK}")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        shards = [
            Shard(shard_name(number), min(shard_size, rows - first))
            for number, first in enumerate(range(0, rows, shard_size))
        ]
        embeds = np.empty((min(shard_size, rows), self.d), np.float32)
        for number, shard in enumerate(shards):
            path = directory / shard.embeds
            if path.exists():
                map_embeds(path, shard.rows, self.d, self.encoder_revision)
                continue
            for start in range(0, shard.rows, BLOCK):
                wanted = min(BLOCK, shard.rows - start)
                embeds[start : start + wanted] = self.block((number * shard_size + start) // BLOCK)[0][:wanted]
            write_embeds(path, embeds[: shard.rows], dtype=dtype, encoder_revision=self.encoder_revision)
        CorpusCard(
            name=self.encoder_revision,
            encoder_revision=self.encoder_revision,
            embed_dim=self.d,
            dtype=dtype,
            shards=tuple(shards),
            source=f"{rows} synthetic sparse mixtures of {self.n_true} known directions",
        ).write(directory)

    def _rng(self, stream: int) -> np.random.Generator:
        # SFC64: numpy's quickest; streams are kept apart by the seed's hashing.
        return np.random.Generator(np.random.SFC64([self.seed, self.n_true, self.d, stream]))

    @cached_property
    def _independent(self) -> npt.NDArray[np.float64]:
        """Each feature's own chance to fire, before pairs are tied."""
        share = np.exp(-np.linspace(0, math.log(_SPREAD), self.n_true))
        target = np.full(self.n_true, self.mean_active)
        # The share is capped, and what the cap takes away is spread over the others.
        for _ in range(50):
            share = np.minimum(share * target / share.sum(), _COMMONEST)
        return share

    @cached_property
    def _places(self) -> npt.NDArray[np.float64]:
        """Cumulated Poisson rates: P(no point falls on a cell) = exp(-rate) = 1 - share."""
        rates = -np.log1p(-self._independent)
        rates[self.together[:, 1]] = 0
        return np.cumsum(rates)

    def _activations(self, rng: np.random.Generator) -> Activations:
        # Points scattered over all cells as a Poisson process: cells that were hit are independent Bernoulli draws, and
        # the cost follows the number of activations, not rows x n_true.
        places = self._places
        points = rng.poisson(BLOCK * places[-1])
        features = np.searchsorted(places, rng.random(points) * places[-1], side="right")
        cells = np.unique(rng.integers(0, BLOCK, points) * self.n_true + features)
        rows, features = np.divmod(cells, self.n_true)
        rows, features = self._with_pairs(rows, features, rng)
        values = np.exp(_LOG_SIGMA * rng.standard_normal(len(rows), dtype=np.float32))
        # E[exp(s Z)^2] = exp(2 s^2)
        values *= NORM / math.sqrt(self.firing_share.sum() * math.exp(2 * _LOG_SIGMA**2))
        indptr = np.zeros(BLOCK + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=BLOCK), out=indptr[1:])
        return Activations(indptr, features, values.astype(np.float32), self.n_true)

    def _with_pairs(
        self, rows: npt.NDArray[np.int64], features: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        fires = np.zeros((self._pairs, 2, BLOCK), bool)
        rival = features < 2 * self._pairs
        fires[features[rival] // 2, features[rival] % 2, rows[rival]] = True
        loser = rng.integers(0, 2, (self._pairs, BLOCK))
        pair, row = features[rival] // 2, rows[rival]
        keep = np.ones(len(rows), bool)
        keep[rival] = ~(fires[:, 0] & fires[:, 1])[pair, row] | (loser[pair, row] != features[rival] % 2)
        rows, features = rows[keep], features[keep]
        leads = (features >= 2 * self._pairs) & (features < 3 * self._pairs)
        leads &= rng.random(len(features)) < 0.9
        follower = self.n_true - 1 - (features[leads] - 2 * self._pairs)
        cells = np.concatenate([rows * self.n_true + features, rows[leads] * self.n_true + follower])
        cells.sort()
        rows, features = np.divmod(cells, self.n_true)
        return rows, features


class Recovered(NamedTuple):
    """Of the true directions.

    Attributes:
        mean: mean over true directions of the largest cosine with any decoder row (Sharkey et al. 2022).
        share: of true directions whose largest cosine is above 0.9.
    """

    mean: float
    share: float


def recovered(W_dec: torch.Tensor, truth: torch.Tensor) -> Recovered:
    """Of decoder rows W_dec [n, d] and true directions [n_true, d], of any norm."""
    best = (functional.normalize(truth, dim=-1) @ functional.normalize(W_dec, dim=-1).T).amax(1)
    return Recovered(float(best.mean()), float((best > 0.9).float().mean()))
