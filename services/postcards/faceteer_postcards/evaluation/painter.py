"""Turn embeddings into pictures in bulk: the bundle's decoder in several processes of one thread each."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch

from faceteer_postcards.bundle import LoadedBundle, load_bundle
from faceteer_postcards.movq import to_pictures
from faceteer_postcards.unet import generate

_loaded: LoadedBundle | None = None


def _load(directory: str) -> None:
    global _loaded
    torch.set_num_threads(1)
    _loaded = load_bundle(Path(directory))


@torch.no_grad()
def paint(bundle: LoadedBundle, embeds: torch.Tensor, seeds: list[int], steps: int) -> npt.NDArray[np.uint8]:
    """Pictures uint8 [n, 64, 64, 3] of embeds [n, d], one noise seed each, with the bundle's guidance."""
    latents = generate(bundle.unet, embeds, bundle.negative, seeds, steps, bundle.guidance)
    return to_pictures(bundle.movq.decode(latents, force_not_quantize=True).sample)


def _paint(embeds: npt.NDArray[np.float32], seeds: list[int], steps: int) -> npt.NDArray[np.uint8]:
    assert _loaded is not None
    return paint(_loaded, torch.from_numpy(embeds), seeds, steps)


class Painter:
    """A pool of decoders; use it in a with statement. Without workers it paints in this process."""

    def __init__(self, directory: Path, steps: int, workers: int = 2, batch: int = 32) -> None:
        self.steps, self.batch = steps, batch
        self.pool: ProcessPoolExecutor | None = None
        if workers:
            self.pool = ProcessPoolExecutor(workers, get_context("spawn"), _load, (str(directory),))
        else:
            _load(str(directory))

    def __enter__(self) -> Painter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pool:
            self.pool.shutdown()

    def __call__(self, embeds: torch.Tensor, seeds: list[int]) -> npt.NDArray[np.uint8]:
        """Pictures uint8 [n, 64, 64, 3] of embeds [n, d]."""
        rows = embeds.detach().float().numpy()
        cuts = [slice(start, start + self.batch) for start in range(0, len(rows), self.batch)]
        if self.pool is None:
            return np.concatenate([_paint(rows[cut], seeds[cut], self.steps) for cut in cuts])
        jobs = [self.pool.submit(_paint, rows[cut], seeds[cut], self.steps) for cut in cuts]
        return np.concatenate([job.result() for job in jobs])
