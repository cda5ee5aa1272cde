"""How well an SAE does on a corpus: figures in one pass, in memory that does not depend on the corpus' size.

Activations are computed for a thousand rows and some thousand features at a time; what is kept is a few numbers a
feature and one a row, and one vector a feature for monosemanticity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from faceteer_sae.reconstruction import Reconstruction
from torch.nn import functional

from faceteer_trainer.sae.autoencoder import Autoencoder
from faceteer_trainer.sae.kernels import Pairs, sum_by_latent, sum_by_row

ROWS = 1024
# Denser blocks than this are multiplied as matrices: gathering vectors one by one costs about this much more.
_SPARSE = 1 / 32
L0_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# Edges of the histogram of firing shares, in powers of ten; features that never fire are counted apart.
DENSITY_EDGES = tuple(np.arange(-6.0, 0.01, 0.5).tolist())

Floats = npt.NDArray[np.float32]
Embeds = Callable[[npt.NDArray[np.int64]], Floats]


class Monosemanticity(NamedTuple):
    """How alike the pictures are on which a feature fires (Pach et al. 2025).

    Attributes:
        scores: float64 [d_sae], NaN where a feature fires on fewer than two pictures of the sample.
        chance: the mean similarity of two pictures of the sample: what a feature that fires on all alike would score.
        fired: int64 [d_sae], on how many pictures of the sample a feature fires.
    """

    scores: npt.NDArray[np.float64]
    chance: float
    fired: npt.NDArray[np.int64]


class _PairSimilarity:
    """Weighted sums of unit embeddings, a feature each, from which pairwise similarities follow without any pair.

    With s_nm = e_n . e_m: ``sum over n != m of a_n a_m s_nm = |sum a_n e_n|^2 - sum a_n^2``, so that
    faceteer_trainer.metrics.monosemanticity over a sample of any size needs one vector a feature.
    """

    def __init__(self, d_sae: int, width: int, device: torch.device) -> None:
        self.vectors = torch.zeros(d_sae, width, device=device)
        self.sums = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.sums)
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.everything = torch.zeros(width, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, first: int, acts: torch.Tensor, unit: torch.Tensor, pairs: Pairs | None) -> None:
        """Activations [m, b] of features from `first` on, unit embeddings [m, width]; `pairs` where they are sparse."""
        part = slice(first, first + acts.shape[1])
        if pairs is None:
            self.vectors[part] += acts.T @ unit
        else:
            latents, sums = sum_by_latent(acts[pairs.rows, pairs.latents], unit, pairs)
            self.vectors[part][latents] += sums
        wide = acts.double()
        self.sums[part] += wide.sum(0)
        self.squares[part] += wide.square().sum(0)
        self.fired[part] += (acts > 0).sum(0)

    def add_rows(self, unit: torch.Tensor) -> None:
        """Count the rows themselves, once for all features."""
        self.everything += unit.double().sum(0)
        self.rows += len(unit)

    def result(self) -> Monosemanticity:
        """The scores."""
        # Into one tensor: small results kept between large temporaries would leave the heap full of holes.
        norms = torch.empty_like(self.sums)
        for start in range(0, len(norms), ROWS):
            norms[start : start + ROWS] = self.vectors[start : start + ROWS].double().square_().sum(1)
        pairs = self.sums.square() - self.squares
        known = (self.fired >= 2) & (pairs > 0)
        scores = torch.where(known, (norms - self.squares) / pairs, torch.nan)
        m = self.rows
        chance = (float(self.everything.square().sum()) - m) / (m * (m - 1)) if m > 1 else float("nan")
        return Monosemanticity(scores.cpu().numpy(), chance, self.fired.cpu().numpy())


@dataclass(frozen=True)
class Evaluation:
    """What an SAE does on m rows of a corpus.

    Attributes:
        reconstruction: explained variance, mean squared error and cosine.
        l0: float32 [m], features that fire on each row.
        firing_share: float64 [d_sae].
        monosemanticity: of the sample, or None where it was not asked for.
    """

    reconstruction: Reconstruction
    l0: npt.NDArray[np.float32]
    firing_share: npt.NDArray[np.float64]
    monosemanticity: Monosemanticity | None

    @property
    def dead_share(self) -> float:
        """The share of features that fire on none of the rows."""
        return float((self.firing_share == 0).mean())

    def density_histogram(self) -> dict[str, Any]:
        """How many features fire how often: `never`, and counts between `edges`, powers of ten of the share."""
        alive = self.firing_share[self.firing_share > 0]
        lowest = DENSITY_EDGES[0]
        counts, _ = np.histogram(np.clip(np.log10(alive), lowest, 0.0), DENSITY_EDGES)
        return {"never": int(len(self.firing_share) - len(alive)), "edges": list(DENSITY_EDGES),
                "counts": counts.tolist()}  # fmt: skip

    def as_dict(self, least_firings: int) -> dict[str, Any]:
        """For JSON and tables; monosemanticity over features that fire on `least_firings` pictures of the sample."""
        quantiles, fit = np.quantile(self.l0, L0_QUANTILES), self.reconstruction
        found: dict[str, Any] = {
            "rows": fit.rows,
            "d_sae": len(self.firing_share),
            "explained_variance": fit.explained_variance,
            "mse": fit.mse,
            "mse_zero_ablation": fit.mse_of_zero,
            "mse_mean_ablation": fit.mse_of_mean,
            "recovered_from_zero": 1 - fit.mse / fit.mse_of_zero if fit.mse_of_zero > 0 else None,
            "cosine": fit.cosine,
            "l0": float(self.l0.mean()),
            "l0_quantiles": {f"p{round(100 * q):02d}": float(v) for q, v in zip(L0_QUANTILES, quantiles, strict=True)},
            "dead_share": self.dead_share,
            "firing_density": self.density_histogram(),
            "monosemanticity": None,
        }
        if self.monosemanticity is not None:
            ms = self.monosemanticity
            kept = ms.scores[(ms.fired >= least_firings) & np.isfinite(ms.scores)]
            found["monosemanticity"] = {
                "mean": float(kept.mean()) if len(kept) else None,
                "median": float(np.median(kept)) if len(kept) else None,
                "p90": float(np.quantile(kept, 0.9)) if len(kept) else None,
                "chance": ms.chance,
                "features": len(kept),
                "least_firings": least_firings,
            }
        return found


@torch.inference_mode()
def evaluate(
    sae: Autoencoder, embeds: Embeds, indices: npt.NDArray[np.int64], *, judge: Embeds | None = None,
    judged_rows: int = 0, progress: Callable[[int], None] = lambda rows: None,
) -> Evaluation:  # fmt: skip
    """Run an SAE over rows of a corpus.

    Args:
        embeds: rows by their numbers, float32 [m, d_in], raw.
        indices: which rows.
        judge: the embeddings that say how alike two pictures are; the same as `embeds` where None.
        judged_rows: how many of the first rows monosemanticity is measured on; 0: not at all.
        progress: called with the number of rows done so far.
    """
    fit, fired = Reconstruction(), torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device)
    similarity: _PairSimilarity | None = None
    l0: list[torch.Tensor] = []
    # No more rows together than keep a block of activations within 16 MB, whatever the dictionary's width.
    for start in range(0, len(indices), ROWS):
        numbers = indices[start : start + ROWS]
        raw = embeds(numbers)
        x = torch.from_numpy(raw).to(sae.device)
        judged = min(len(numbers), max(0, judged_rows - start))
        unit = None
        if judged:
            by = x[:judged] if judge is None else torch.from_numpy(judge(numbers[:judged])).to(sae.device)
            unit = functional.normalize(by, dim=1)
            if similarity is None:
                similarity = _PairSimilarity(sae.d_sae, unit.shape[1], sae.device)
            similarity.add_rows(unit)
        x_hat, on_each = _reconstruct(sae, x, fired, similarity, unit)
        fit.add(raw, x_hat.cpu().numpy())
        l0.append(on_each)
        progress(start + len(numbers))
    return Evaluation(
        fit,
        torch.cat(l0).cpu().numpy(),
        (fired.double() / fit.rows).cpu().numpy(),
        None if similarity is None else similarity.result(),
    )


def _reconstruct(
    sae: Autoencoder, x: torch.Tensor, fired: torch.Tensor, similarity: _PairSimilarity | None,
    unit: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Reconstructions of rows [m, d_in] and how many features fire on each, float32 [m]; counts firings in `fired`."""
    x_hat = sae.b_dec.expand_as(x).clone()
    l0 = torch.zeros(len(x), device=sae.device)
    for first, acts in sae.blocks(x):
        part = slice(first, first + acts.shape[1])
        on = acts > 0
        counts = on.sum(0)
        fired[part] += counts
        l0 += on.sum(1)
        sparse = int(counts.sum()) < _SPARSE * acts.numel()
        if sparse:
            pairs = Pairs(*on.nonzero(as_tuple=True))
            x_hat += sum_by_row(acts[pairs.rows, pairs.latents], sae.W_dec[part], pairs, len(x))
        else:
            x_hat += acts @ sae.W_dec[part]
        if similarity is not None and unit is not None:
            few = acts[: len(unit)]
            similarity.add(first, few, unit, Pairs(*(few > 0).nonzero(as_tuple=True)) if sparse else None)
    return x_hat, l0
