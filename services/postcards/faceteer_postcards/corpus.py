"""Draw postcards: many ahead of time into one memory-mapped file, in several processes, or a few as picture files.

Trainers read pictures from here and never draw; scene i of a corpus is the same whoever draws it.
"""

from __future__ import annotations

import io
import json
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from faceteer_runtime.files import whole_file
from PIL import Image

from faceteer_postcards.captions import describe
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


def pack_pictures(corpus: Corpus, count: int, path: Path) -> None:
    """The first ``count`` pictures as a tar of PNG files, each with a caption that names five to eight factors."""
    with whole_file(path) as part, tarfile.open(part, "w") as tar:
        for number in range(count):
            picture = io.BytesIO()
            caption = describe(corpus.codes[number], np.random.default_rng((corpus.seed, number)), 5)
            Image.fromarray(corpus.pictures[number]).save(picture, "PNG", compress_level=1)
            for suffix, data in ((".png", picture.getvalue()), (".txt", caption.text.encode())):
                entry = tarfile.TarInfo(f"postcard-{number:05}{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


# Pictures to try the product with, that no model of the bundle was trained on: seeds beyond those of every corpus.
_SEED = 2_000_000_001
EXAMPLES: Final[dict[str, Scene]] = {
    "boat-day": Scene("day", "water", "boat", "red", "one", "clear", "none", "plain", _SEED),
    "house-dusk": Scene("dusk", "grass", "house", "yellow", "one", "clear", "white", "plain", _SEED + 1),
    "cats-meadow": Scene("day", "grass", "cat", "orange", "two", "clear", "none", "outlined", _SEED + 2),
    "balloons-dawn": Scene("dawn", "sand", "balloon", "purple", "three", "clear", "none", "plain", _SEED + 3),
    "trees-snow": Scene("day", "snow", "tree", "green", "three", "snowfall", "black", "plain", _SEED + 4),
    "car-night": Scene("night", "sand", "car", "blue", "one", "clear", "none", "outlined", _SEED + 5),
}


def write_examples(directory: Path) -> None:
    """Write each example as a 64 x 64 PNG."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, scene in EXAMPLES.items():
        Image.fromarray(render(scene)).save(directory / f"{name}.png", optimize=True)
