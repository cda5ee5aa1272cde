"""Measures an SAE on a corpus: what each feature does there, what embeddings are usual, and how good the fit is."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from faceteer_sae.novelty import Novelty
from faceteer_sae.reconstruction import Reconstruction
from faceteer_sae.rivals import RULE, Rivals, find_rivals
from faceteer_sae.statistics import FeatureStatistics, embedding_statistics

from faceteer_trainer.corpus.shards import EmbeddingCorpus
from faceteer_trainer.sae.autoencoder import Autoencoder
from faceteer_trainer.sae.kernels import sum_by_row
from faceteer_trainer.sae.sampling import BlockShuffle

# Firings held at once: 16 bytes each. Rows stop being measured where a dense SAE would fire more often.
_MOST_PAIRS = 30_000_000
# Rivals are looked for among this many of the commonest features.
_MOST_COMMON = 4096
_CHUNK = 1024
# Rows, spread over the corpus, that novelty is learnt from: of 1,280 values each they are 100 MB.
NOVELTY_ROWS = 20_000


class Measured(NamedTuple):
    """What an SAE does on a corpus.

    Attributes:
        statistics: per feature, as feature_statistics.safetensors holds them.
        embedding_statistics: percentiles of norm and L0, as cfg.json holds them.
        figures: explained_variance, cosine (mean), l0 (mean), dead_share (features that fired on none of the rows),
            rows.
    """

    statistics: FeatureStatistics
    embedding_statistics: dict[str, dict[str, float]]
    figures: dict[str, float]


@torch.no_grad()
def measure(model: Autoencoder, corpus: EmbeddingCorpus, most_rows: int) -> Measured:
    """Runs an SAE for raw embeddings over up to `most_rows` rows from all over the corpus, as it will be served."""
    count = min(most_rows, len(corpus))
    # Spread over the corpus without repeats; the whole corpus in its own order where that suffices.
    indices = np.arange(count) if count == len(corpus) else BlockShuffle(len(corpus), count, seed=1).indices(0)
    latents, acts, norms, l0s = [], [], [], []
    sums, firings = Reconstruction(), 0
    step = -(-count // NOVELTY_ROWS)
    kept, errors = [], []
    for start in range(0, count, _CHUNK):
        raw = corpus.rows(indices[start : start + _CHUNK])
        x = torch.from_numpy(raw).to(model.device)
        pairs, values = model.fire(x)
        found = (sum_by_row(values, model.W_dec, pairs, len(x)) + model.b_dec).cpu().numpy()
        sums.add(raw, found)
        every = slice(-start % step, None, step)
        kept.append(raw[every])
        errors.append(np.square(raw[every] - found[every]).sum(1))
        latents.append(pairs.latents.int().cpu())
        acts.append(values.cpu())
        l0s.append(torch.bincount(pairs.rows, minlength=len(x)).cpu())
        norms.append(x.norm(dim=-1).cpu())
        firings += len(values)
        if firings > _MOST_PAIRS:
            break
    l0 = torch.cat(l0s)
    mean = sums.mean.astype(np.float32)
    novelty = Novelty.fit(np.concatenate(kept), np.concatenate(errors), mean)
    statistics = _statistics(torch.cat(latents), torch.cat(acts), l0, model.d_sae)
    statistics = replace(statistics, embedding_mean=mean, novelty=novelty)
    figures = {
        "explained_variance": sums.explained_variance, "cosine": sums.cosine, "l0": float(l0.float().mean()),
        "dead_share": float((statistics.firing_share == 0).mean()), "rows": sums.rows,
    }  # fmt: skip
    return Measured(statistics, embedding_statistics(torch.cat(norms).numpy(), l0.numpy()), figures)


def _statistics(latents: torch.Tensor, acts: torch.Tensor, l0: torch.Tensor, d_sae: int) -> FeatureStatistics:
    """Of firings [P] in the order of the rows, l0 int64 [m] of which each row has."""
    counts = torch.bincount(latents, minlength=d_sae)
    by_value = acts.argsort()
    order = by_value[latents[by_value].argsort(stable=True)]
    values = torch.cat([acts[order], acts.new_zeros(1)])
    # The 99th percentile, linear between neighbours as torch.quantile has it.
    place = (counts - 1).clamp_min(0).double() * 0.99
    low = counts.cumsum(0) - counts + place.floor().long()
    high = torch.minimum(low + 1, (counts.cumsum(0) - 1).clamp_min(0))
    p99 = torch.lerp(values[low], values[high], (place - place.floor()).float())
    p99 = torch.where(counts > 0, p99, 0.0)
    rivals = _rivals(latents, acts > RULE.strong * p99[latents], l0, d_sae)
    share = (counts.double() / len(l0)).float()
    return FeatureStatistics(share.numpy(), p99.numpy(), rivals.offsets, rivals.indices)


def _rivals(latents: torch.Tensor, strong: torch.Tensor, l0: torch.Tensor, d_sae: int) -> Rivals:
    """Among the commonest features; `strong` bool [P]: which firings are strong."""
    count = torch.bincount(latents[strong], minlength=d_sae)
    common = count.topk(min(_MOST_COMMON, d_sae)).indices
    common = common[count[common] >= RULE.least_share * len(l0)].sort().values
    place = torch.full((d_sae,), -1)
    place[common] = torch.arange(len(common))
    together = torch.zeros(len(common), len(common))
    ends = l0.cumsum(0)
    for first in range(0, len(l0), 4096):
        last = min(first + 4096, len(l0))
        part = slice(int(ends[first] - l0[first]), int(ends[last - 1]))
        rows = torch.repeat_interleave(torch.arange(last - first), l0[first:last])
        columns = place[latents[part]]
        kept = strong[part] & (columns >= 0)
        fires = torch.zeros(last - first, len(common))
        fires[rows[kept], columns[kept]] = 1
        together += fires.T @ fires
    return find_rivals(common.numpy(), together.long().numpy(), count.numpy(), len(l0))
