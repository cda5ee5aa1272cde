"""How well an SAE that is served does on a corpus: figures in one pass, in memory that no corpus' size changes.

It knows nothing of files' formats, tables or plots. Activations are computed for a thousand rows and some thousand
features at a time; what is kept is a few numbers a feature and one a row, and one vector a feature for monosemanticity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from faceteer_runtime.bundle import BundleError
from faceteer_sae.rows import BLOCK, Rows
from faceteer_sae.weights import SaeConfig, decoder_rows, encoder_rows, load_config, load_weights
from torch.nn import functional

from faceteer_trainer.errors import JobError
from faceteer_trainer.sae.kernels import Pairs, sum_by_latent, sum_by_row
from faceteer_trainer.sae.selection import select_topk

ROWS, FEATURES = 1024, 4096
# Denser blocks than this are multiplied as matrices: gathering vectors one by one costs about this much more.
_SPARSE = 1 / 32
L0_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# Edges of the histogram of firing shares, in powers of ten; features that never fire are counted apart.
DENSITY_EDGES = tuple(np.arange(-6.0, 0.01, 0.5).tolist())

Floats = npt.NDArray[np.float32]
Embeds = Callable[[npt.NDArray[np.int64]], Floats]


class ServedSae:
    """The SAE in a bundle's ``sae/`` for many rows at once, in float32; the formulas are faceteer_sae.model's."""

    def __init__(self, config: SaeConfig, weights: dict[str, torch.Tensor], device: str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        self.d_in, self.d_sae = config.d_in, config.d_sae
        self.W_enc = _whole(encoder_rows(weights), self.device)
        self.W_dec = _whole(decoder_rows(weights), self.device)
        self.b_enc = weights["b_enc"].float().to(self.device)
        self.b_dec = weights["b_dec"].float().to(self.device)
        given = weights.get("threshold", weights.get("topk_threshold", torch.zeros(())))
        self.threshold = given.float().clamp_min(0).expand(self.d_sae).to(self.device)

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> ServedSae:
        """Reads cfg.json and sae_weights.safetensors, in either layout.

        Raises:
            JobError: what is wrong with which file.
        """
        try:
            config = load_config(directory)
            return cls(config, load_weights(directory, config), device)
        except BundleError as error:
            raise JobError(str(error)) from None

    def blocks(self, x: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Activations of x [m, d_in], some features at a time: (first feature, float32 [m, <= FEATURES]).

        For topk exactly k features fire (or fewer, where fewer are above 0); of equal pre-activations at the k-th
        place, which the service lets all fire, one is taken.
        """
        x_in = x - self.b_dec if self.config.apply_b_dec_to_input else x
        topk = self.config.architecture == "topk"
        pairs = select_topk(x_in, self.W_enc, self.b_enc, self.config.k) if topk else None
        for first in range(0, self.d_sae, FEATURES):
            part = slice(first, min(first + FEATURES, self.d_sae))
            if pairs is None:
                pre = torch.addmm(self.b_enc[part], x_in, self.W_enc[part].T)
                yield first, torch.where(pre > self.threshold[part], pre, 0.0)
            else:
                yield first, self._chosen(x_in, pairs, part)

    def fire(self, x: torch.Tensor, k: int) -> tuple[Pairs, torch.Tensor]:
        """The firings on x [m, d_in] and their activations [P], as sae.architectures.Autoencoder gives them.

        Args:
            k: as the SAE's own.
        """
        rows, latents, acts = [], [], []
        for first, block in self.blocks(x):
            at, columns = block.nonzero(as_tuple=True)
            rows.append(at)
            latents.append(columns + first)
            acts.append(block[at, columns])
        where, which = torch.cat(rows), torch.cat(latents)
        order = (where * self.d_sae + which).argsort()
        return Pairs(where[order], which[order]), torch.cat(acts)[order]

    def _chosen(self, x_in: torch.Tensor, pairs: Pairs, part: slice) -> torch.Tensor:
        here = (pairs.latents >= part.start) & (pairs.latents < part.stop)
        rows, columns = pairs.rows[here], pairs.latents[here]
        acts = torch.zeros(len(x_in), part.stop - part.start, device=self.device)
        for start in range(0, len(rows), 8192):
            some = slice(start, start + 8192)
            pre = torch.linalg.vecdot(x_in[rows[some]], self.W_enc[columns[some]]) + self.b_enc[columns[some]]
            acts[rows[some], columns[some] - part.start] = pre.clamp_min(0)
        return acts


def _whole(rows: Rows, device: torch.device) -> torch.Tensor:
    """All rows in float32; never two copies of them at once."""
    whole = torch.empty(rows.values.shape, device=device)
    for number, block in enumerate(rows.blocks()):
        whole[number * BLOCK : number * BLOCK + len(block)] = block
    return whole


@dataclass
class _Tally:
    """Sums over the rows seen so far."""

    fired: torch.Tensor  # int64 [d_sae]: rows in which a feature fires
    total: torch.Tensor  # float64 [d_in]: of the embeddings
    squares: float = 0.0
    error: float = 0.0
    cosine: float = 0.0
    rows: int = 0


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
    evaluation.metrics.monosemanticity over a sample of any size needs one vector a feature.
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
        explained_variance: 1 - sum of squared errors / sum of squared distances from the rows' mean.
        mse: mean squared error of one value of a raw embedding.
        mse_zero, mse_mean: the same if every reconstruction were zero, or the rows' mean: anchors for mse.
        cosine: mean cosine of embedding and reconstruction.
        l0: float32 [m], features that fire on each row.
        firing_share: float64 [d_sae].
        monosemanticity: of the sample, or None where it was not asked for.
        rows: m.
    """

    explained_variance: float
    mse: float
    mse_zero: float
    mse_mean: float
    cosine: float
    l0: npt.NDArray[np.float32]
    firing_share: npt.NDArray[np.float64]
    monosemanticity: Monosemanticity | None
    rows: int

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
        quantiles = np.quantile(self.l0, L0_QUANTILES)
        found: dict[str, Any] = {
            "rows": self.rows,
            "d_sae": len(self.firing_share),
            "explained_variance": self.explained_variance,
            "mse": self.mse,
            "mse_zero_ablation": self.mse_zero,
            "mse_mean_ablation": self.mse_mean,
            "recovered_from_zero": 1 - self.mse / self.mse_zero if self.mse_zero > 0 else None,
            "cosine": self.cosine,
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
    sae: ServedSae, embeds: Embeds, indices: npt.NDArray[np.int64], *, judge: Embeds | None = None,
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
    tally = _Tally(torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device),
                   torch.zeros(sae.d_in, dtype=torch.float64, device=sae.device))  # fmt: skip
    similarity: _PairSimilarity | None = None
    l0: list[torch.Tensor] = []
    # No more rows together than keep a block of activations within 16 MB, whatever the dictionary's width.
    for start in range(0, len(indices), ROWS):
        numbers = indices[start : start + ROWS]
        raw = torch.from_numpy(embeds(numbers)).to(sae.device)
        judged = min(len(numbers), max(0, judged_rows - start))
        unit = None
        if judged:
            by = raw[:judged] if judge is None else torch.from_numpy(judge(numbers[:judged])).to(sae.device)
            unit = functional.normalize(by, dim=1)
            if similarity is None:
                similarity = _PairSimilarity(sae.d_sae, unit.shape[1], sae.device)
            similarity.add_rows(unit)
        l0.append(_add(sae, raw, tally, similarity, unit))
        progress(start + len(numbers))
    n, values = tally.rows, tally.rows * sae.d_in
    variance = max(tally.squares - float(tally.total.square().sum()) / n, 0.0)
    return Evaluation(
        explained_variance=1 - tally.error / variance if variance > 0 else float("nan"),
        mse=tally.error / values,
        mse_zero=tally.squares / values,
        mse_mean=variance / values,
        cosine=tally.cosine / n,
        l0=torch.cat(l0).cpu().numpy(),
        firing_share=(tally.fired.double() / n).cpu().numpy(),
        monosemanticity=None if similarity is None else similarity.result(),
        rows=n,
    )


def _add(sae: ServedSae, raw: torch.Tensor, tally: _Tally, similarity: _PairSimilarity | None,
         unit: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
    """Add rows [m, d_in] to the tally; how many features fire on each, float32 [m]."""
    x_hat = sae.b_dec.expand_as(raw).clone()
    l0 = torch.zeros(len(raw), device=sae.device)
    for first, acts in sae.blocks(raw):
        part = slice(first, first + acts.shape[1])
        on = acts > 0
        fired = on.sum(0)
        tally.fired[part] += fired
        l0 += on.sum(1)
        sparse = int(fired.sum()) < _SPARSE * acts.numel()
        if sparse:
            pairs = Pairs(*on.nonzero(as_tuple=True))
            x_hat += sum_by_row(acts[pairs.rows, pairs.latents], sae.W_dec[part], pairs, len(raw))
        else:
            x_hat += acts @ sae.W_dec[part]
        if similarity is not None and unit is not None:
            few = acts[: len(unit)]
            similarity.add(first, few, unit, Pairs(*(few > 0).nonzero(as_tuple=True)) if sparse else None)
    wide = raw.double()
    tally.total += wide.sum(0)
    tally.squares += float(wide.square().sum())
    tally.error += float((wide - x_hat).square().sum())
    tally.cosine += float(functional.cosine_similarity(raw, x_hat, dim=1).double().sum())
    tally.rows += len(raw)
    return l0
