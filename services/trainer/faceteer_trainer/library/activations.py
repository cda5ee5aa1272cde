"""Activations of a whole corpus on disk, in files of some thousand pictures: written once, read as often as needed.

They take 8 bytes for each feature that fires on a picture (0.4 GB for 1.4 million pictures at L0 32), on disk and not
in memory, and are what a stopped build resumes from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from faceteer_runtime.files import write_json

from faceteer_trainer.errors import JobError
from faceteer_trainer.files import job_file
from faceteer_trainer.library.encoding import Active

_CARD = "activations.json"


class Block(NamedTuple):
    """Some pictures in a row: the number of the first one, and what fires on them."""

    first: int
    active: Active


class ActivationStore:
    """A directory of blocks."""

    def __init__(self, directory: Path, facts: dict[str, Any]) -> None:
        """Opens the directory, or makes it.

        Args:
            directory: for this store alone.
            facts: what the activations depend on; a directory with others is refused.

        Raises:
            JobError: it holds activations of something else.
        """
        self._directory = directory
        card = directory / _CARD
        directory.mkdir(parents=True, exist_ok=True)
        if card.exists():
            held = json.loads(card.read_text(encoding="utf-8"))
            if held != facts:
                different = next(key for key in facts if held.get(key) != facts[key])
                raise JobError(
                    f"{directory}: an unfinished build with another {different} ({held.get(different)}, now "
                    f"{facts[different]}) is in the way; delete the directory, or finish that build"
                )
        else:
            write_json(card, facts)

    def has(self, first: int) -> bool:
        """Whether the block that begins with this picture has been written."""
        return self._path(first).exists()

    def write(self, first: int, active: Active) -> None:
        """Adds a block, whole or not at all."""
        with job_file(self._path(first)) as part, part.open("wb") as file:
            for array in (active.indptr, active.indices, active.values):
                np.save(file, array)

    def blocks(self) -> Iterator[Block]:
        """All blocks, in the corpus' order."""
        for path in sorted(self._directory.glob("block-*.bin")):
            first = int(path.stem.removeprefix("block-"))
            with path.open("rb") as file:
                yield Block(first, Active(*(np.load(file) for _ in range(3))))

    def rows(self, wanted: npt.NDArray[np.int64]) -> Active:
        """What fires on these pictures (ascending numbers), whichever blocks they are in."""
        indices, values, counts = [], [], np.zeros(len(wanted), np.int64)
        for first, active in self.blocks():
            here = np.flatnonzero((wanted >= first) & (wanted < first + len(active.indptr) - 1))
            if len(here) == 0:
                continue
            local = wanted[here] - first
            counts[here] = active.indptr[local + 1] - active.indptr[local]
            taken = spans(active.indptr[local], counts[here])
            indices.append(active.indices[taken])
            values.append(active.values[taken])
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        empty = np.empty(0, np.int32), np.empty(0, np.float32)
        return Active(indptr, np.concatenate([empty[0], *indices]), np.concatenate([empty[1], *values]))

    def _path(self, first: int) -> Path:
        return self._directory / f"block-{first:012d}.bin"


def spans(starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The numbers starts[i], starts[i] + 1, ... of every span i, one after the other."""
    total = int(counts.sum())
    offsets = np.repeat(starts - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    return offsets + np.arange(total)
