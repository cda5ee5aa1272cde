"""Draw many postcards ahead of time into one memory-mapped file, in several processes.

Trainers read pictures from here and never draw; scene i of a corpus is the same whoever draws it.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt

from faceteer_postcards.render import SIZE, render
from faceteer_postcards.world import FACTOR_NAMES, Scene, sample_codes

_STRIDE = 10_000_019  # scene seeds of two corpora never meet


@dataclass(frozen=True)
class Corpus:
    """Pictures uint8 [n, 64, 64, 3] on disk, and the factors' indices behind them [n, 8]."""

    pictures: npt.NDArray[np.uint8]
    codes: npt.NDArray[np.uint8]
    seed: int

    def __len__(self) -> int:
        return len(self.codes)

    def scene(self, index: int) -> Scene:
        """The scene that picture `index` shows."""
        return Scene.from_codes(self.codes[index], scene_seed(self.seed, index))


def scene_seed(seed: int, index: int) -> int:
    """The seed of scene `index` in the corpus `seed`."""
    return seed * _STRIDE + index


def _draw(path: str, count: int, seed: int, start: int, stop: int) -> None:
    pictures = np.memmap(path, dtype=np.uint8, mode="r+", shape=(count, SIZE, SIZE, 3))
    codes = sample_codes(count, seed)
    for index in range(start, stop):
        pictures[index] = render(Scene.from_codes(codes[index], scene_seed(seed, index)))
    pictures.flush()


def draw_corpus(directory: Path, count: int, seed: int, processes: int = 1) -> Corpus:
    """Draw `count` scenes into `directory`, or open them if they are there already with this count and seed."""
    directory.mkdir(parents=True, exist_ok=True)
    path, card = directory / "pictures.u8", directory / "corpus.json"
    wanted = {"count": count, "seed": seed, "size": SIZE, "factors": list(FACTOR_NAMES)}
    if not card.exists() or json.loads(card.read_text()) != wanted:
        card.unlink(missing_ok=True)
        np.memmap(path, dtype=np.uint8, mode="w+", shape=(count, SIZE, SIZE, 3)).flush()
        if processes == 1:
            _draw(str(path), count, seed, 0, count)
        else:
            bounds = np.linspace(0, count, processes + 1).astype(int).tolist()
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                jobs = [pool.submit(_draw, str(path), count, seed, start, stop) for start, stop in pairwise(bounds)]
                for job in jobs:
                    job.result()
        card.write_text(json.dumps(wanted) + "\n")  # written last: a half-drawn corpus is drawn again
    return open_corpus(directory)


def open_corpus(directory: Path) -> Corpus:
    """A corpus drawn before."""
    card = json.loads((directory / "corpus.json").read_text())
    shape = (card["count"], SIZE, SIZE, 3)
    pictures = np.memmap(directory / "pictures.u8", dtype=np.uint8, mode="r", shape=shape)
    return Corpus(pictures, sample_codes(card["count"], card["seed"]), card["seed"])
