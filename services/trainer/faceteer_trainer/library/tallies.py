"""Statistics of every feature from blocks of activations, in memory that depends on the dictionary and not the corpus.

    Spread   count, mean, max and quantiles: a histogram with bins of equal ratio (as DDSketch, Masson et al. 2019)
    Table    for every feature its M entries of greatest priority: the strongest, or a uniform sample
    Pairs    how often each two of the commonest features fire together

All of them are sums or maxima, so the order of the blocks does not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from faceteer_trainer.library.encoding import Active

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
# Neighbouring bins' edges differ by 2 %, so a quantile read off its bin's middle is wrong by at most 1 %.
_RATIO = 1.02
_BINS = 700  # a range of a million to one
_SLAB = 1024  # features whose pairs are counted at a time


class Spread:
    """How often and how strongly each feature fires. 163,840 features take 0.46 GB."""

    def __init__(self, d_sae: int, largest: float) -> None:
        """largest: the largest activation to expect; quantiles reach from 16 times it down to a millionth of that."""
        self.count = np.zeros(d_sae, np.int64)
        self.total = np.zeros(d_sae, np.float64)
        self.max = np.zeros(d_sae, np.float32)
        self._bins = np.zeros((d_sae, _BINS), np.uint32)
        self._lowest = 16 * largest / _RATIO**_BINS

    def add(self, active: Active) -> None:
        """Takes a block in."""
        np.add.at(self.count, active.indices, 1)
        np.add.at(self.total, active.indices, active.values)
        np.maximum.at(self.max, active.indices, active.values)
        np.add.at(self._bins, (active.indices, self._bin(active.values)), 1)

    def mean(self) -> Floats:
        """Of the activation where it fires; 0 for a feature that never does."""
        return (self.total / np.maximum(self.count, 1)).astype(np.float32)

    def quantile(self, q: float) -> Floats:
        """The q-quantile of each feature's activation where it fires, within 1 %; 0 where it never does."""
        # The rank that numpy's "lower" method takes, counted from one.
        rank = np.floor(q * np.maximum(self.count - 1, 0)).astype(np.int64) + 1
        found = np.empty(len(self.count), np.float32)
        for start in range(0, len(found), 4096):
            part = slice(start, start + 4096)
            position = (np.cumsum(self._bins[part], axis=1, dtype=np.int64) < rank[part, None]).sum(axis=1)
            found[part] = self._lowest * _RATIO ** (position + 0.5)
        return np.asarray(np.where(self.count > 0, np.minimum(found, self.max), 0), np.float32)

    def rank(self, features: npt.NDArray[np.integer], values: Floats) -> Floats:
        """The share, 0 to 1, of a feature's firing pictures on which it is weaker than this, to within a bin."""
        below = np.empty(len(values), np.float64)
        bins = self._bin(values)
        for start in range(0, len(values), 65_536):
            part = slice(start, start + 65_536)
            cumulative = np.cumsum(self._bins[features[part]], axis=1, dtype=np.int64)
            at = bins[part]
            here = np.take_along_axis(cumulative, at[:, None], 1)[:, 0]
            below[part] = here - self._bins[features[part], at] / 2
        return np.asarray(below / np.maximum(self.count[features], 1), np.float32)

    def histogram(self, feature: int, bins: int) -> tuple[Floats, Ints]:
        """Upper edges and counts of bins of equal width from 0 to the feature's max; bin borders within 1 %."""
        top = float(self.max[feature]) or 1.0
        middles = self._lowest * _RATIO ** (np.arange(_BINS) + 0.5)
        counts, edges = np.histogram(np.minimum(middles, top), bins, (0.0, top), weights=self._bins[feature])
        return edges[1:].astype(np.float32), np.rint(counts).astype(np.int64)

    def _bin(self, values: Floats) -> Ints:
        position = np.log(np.maximum(values, self._lowest) / self._lowest) / math.log(_RATIO)
        return np.clip(position.astype(np.int64), 0, _BINS - 1)


class Table:
    """Every feature's entries of greatest priority, most_each of them, from any number of blocks."""

    def __init__(self, d_sae: int, most_each: int, buffer: int = 4_000_000) -> None:
        self._most, self._buffer_size = most_each, buffer
        self._floor = np.full(d_sae, -np.inf, np.float32)
        self._kept = _Entries.none()
        self._waiting: list[_Entries] = []
        self._count = 0

    def add(self, features: npt.NDArray[np.int32], rows: Ints, values: Floats, priority: Floats) -> None:
        """Entries of a block: picture numbers, activations, and by what they are ranked."""
        good = priority > self._floor[features]
        self._waiting.append(_Entries(features[good], rows[good], values[good], priority[good]))
        self._count += int(good.sum())
        if self._count >= self._buffer_size:
            self._merge()

    def entries(self) -> _Entries:
        """Everything kept, by feature and falling priority (then by picture)."""
        self._merge()
        return self._kept

    def _merge(self) -> None:
        every = _Entries.joined([self._kept, *self._waiting])
        order = np.lexsort((every.rows, -every.priority, every.features))
        features = every.features[order]
        starts: Ints = np.flatnonzero(np.diff(features, prepend=-1))
        place = np.arange(len(features)) - np.repeat(starts, np.diff(starts, append=len(features)))
        self._kept = every.take(order[place < self._most])
        # A full table admits only what beats its last entry; equal ones come later in the corpus.
        last = order[place == self._most - 1]
        self._floor[every.features[last]] = every.priority[last]
        self._waiting, self._count = [], 0


@dataclass(frozen=True)
class _Entries:
    """Columns of a table, all of one length."""

    features: npt.NDArray[np.int32]
    rows: Ints
    values: Floats
    priority: Floats

    @classmethod
    def none(cls) -> _Entries:
        return cls(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.float32))

    @classmethod
    def joined(cls, parts: list[_Entries]) -> _Entries:
        return cls(
            np.concatenate([part.features for part in parts]),
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.priority for part in parts]),
        )

    def take(self, which: Ints) -> _Entries:
        """Some of them, in the order asked for."""
        return _Entries(self.features[which], self.rows[which], self.values[which], self.priority[which])

    def of(self, feature: int) -> _Entries:
        """One feature's, of entries sorted by feature."""
        # In the column's own type: otherwise numpy would convert the whole column for every feature.
        start, stop = np.searchsorted(self.features, np.array([feature, feature + 1], self.features.dtype))
        return self.take(np.arange(start, stop))


def lottery(features: npt.NDArray[np.int32], rows: Ints, seed: int) -> Floats:
    """A number in (0, 1) for each (picture, feature), random but always the same: the greatest are a uniform sample."""
    with np.errstate(over="ignore"):
        # SplitMix64's finaliser (Steele, Lea and Flood 2014) over both numbers and the seed.
        mixed = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + features.astype(np.uint64)
        mixed = mixed * np.uint64(0xD1B54A32D192ED03) + np.uint64(seed)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return ((mixed >> np.uint64(40)).astype(np.float32) + 0.5) / np.float32(2**24)


class Pairs:
    """How often each two of some features fire together: exact counts, int32 [c, c]; 8,192 features take 0.27 GB."""

    def __init__(self, features: Ints, d_sae: int) -> None:
        """features: those counted, rising."""
        self.features = features
        self._place = np.full(d_sae, -1, np.int64)
        self._place[features] = np.arange(len(features))
        self.together = np.zeros((len(features), len(features)), np.int32)

    def add(self, active: Active, counts: npt.NDArray[np.bool_] | None = None) -> None:
        """Takes a block in; of its entries only those that count, if told."""
        places = self._place[active.indices]
        good = places >= 0 if counts is None else (places >= 0) & counts
        rows = active.rows[good]
        matrix = sparse.csr_matrix(
            (np.ones(len(rows), np.int32), (rows, places[good])), (len(active.indptr) - 1, len(self.features))
        )
        transposed = matrix.T.tocsr()
        # In slabs: where many features fire the product is nearly dense, and would take gigabytes as a whole.
        for start in range(0, len(self.features), _SLAB):
            product = (transposed[start : start + _SLAB] @ matrix).tocoo()
            self.together[product.row + start, product.col] += product.data
