"""Which rows of a corpus a step sees: shuffled without a permutation in memory, from (seed, step) alone.

Blocks of neighbouring rows are put in random order, and rows are mixed within a
window of many blocks; both orders are computed, not stored, so a billion rows take no more memory than a thousand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_ROUNDS = 6


def _mix(values: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """A hash of 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(key & (2**64 - 1))
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def permuted(places: npt.NDArray[np.int64], size: int, keys: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Where a random permutation of 0 .. size - 1 sends `places`: a Feistel network (Luby and Rackoff 1988).

    It permutes the next power of 4; a value that falls outside walks on until it is inside (Black and Rogaway 2002).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    seeds = np.random.SeedSequence(keys).generate_state(_ROUNDS, np.uint64)
    values = places.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for seed in seeds:
            left, right = right, left ^ (_mix(right, int(seed)) & mask)
        values[outside] = (left << half) | right
        outside = values >= size
    return values.astype(np.int64)


@dataclass(frozen=True)
class BlockShuffle:
    """Every row once an epoch (but up to block - 1 rows twice, where the last block is short).

    Attributes:
        rows: in the corpus.
        batch: rows a step.
        seed: another seed, another order.
        block: neighbouring rows that are read from the disk together.
        window: rows among which a batch's rows are mixed.
    """

    rows: int
    batch: int
    seed: int
    block: int = 32
    window: int = 1 << 17

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """Row numbers int64 [batch] of a step."""
        blocks = -(-self.rows // self.block)
        epoch_size = blocks * self.block
        places = step * self.batch + np.arange(self.batch, dtype=np.int64)
        epochs, places = np.divmod(places, epoch_size)
        windows, within = np.divmod(places, self.window)
        found = np.empty(self.batch, np.int64)
        for epoch, window in sorted(set(zip(epochs.tolist(), windows.tolist(), strict=True))):
            here = (epochs == epoch) & (windows == window)
            first = window * self.window
            size = min(self.window, epoch_size - first)
            place = first + permuted(within[here], size, (self.seed, epoch, 1, window))
            slot, offset = np.divmod(place, self.block)
            found[here] = permuted(slot, blocks, (self.seed, epoch, 0)) * self.block + offset
        return found % self.rows
