"""What a training leaves: the SAE as a bundle serves it, and what its features do on the corpus, in bounded memory.

It knows nothing of how the weights were found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch.nn import functional

from faceteer_trainer.corpus.shards import EmbeddingCorpus, whole_file
from faceteer_trainer.errors import JobError
from faceteer_trainer.sae.architectures import Autoencoder
from faceteer_trainer.sae.kernels import sum_by_row
from faceteer_trainer.sae.sampling import BlockShuffle
from faceteer_trainer.sae.statistics import STRONG, FeatureStatistics, rivals_from_counts

# Firings held at once: 16 bytes each. Rows stop being measured where a dense SAE would fire more often.
_MOST_PAIRS = 30_000_000
# Rivals are looked for among this many of the commonest features.
_MOST_COMMON = 4096
_CHUNK = 1024


class Measured(NamedTuple):
    """What an SAE does on a corpus.

    Attributes:
        statistics: per feature, as feature_statistics.safetensors holds them.
        embedding_statistics: percentiles of norm and L0.
        figures: explained_variance (1 - sum of squared errors / sum of squared distances from the mean), cosine (mean,
            of raw embeddings), l0, dead_share (features that fired on none of the rows), rows.
    """

    statistics: FeatureStatistics
    embedding_statistics: dict[str, dict[str, float]]
    figures: dict[str, float]


@torch.no_grad()
def measure(model: Autoencoder, corpus: EmbeddingCorpus, scale: float, k: int, most_rows: int) -> Measured:
    """Run the SAE over up to `most_rows` rows from all over the corpus, as it will be served."""
    count = min(most_rows, len(corpus))
    # From all over, without a row twice; in the corpus' own order where that is everything.
    shuffle = BlockShuffle(len(corpus), count, seed=1)
    indices = torch.arange(count).numpy() if count == len(corpus) else shuffle.indices(0)
    device = model.b_dec.device
    latents, acts, norms, l0s, cosines = [], [], [], [], []
    squared = total_square = 0.0
    total, rows, pairs_held = torch.zeros(model.d_in, dtype=torch.float64), 0, 0
    for start in range(0, count, _CHUNK):
        raw = torch.from_numpy(corpus.rows(indices[start : start + _CHUNK])).to(device)
        pairs, values = model.fire(raw / scale, k)
        x_hat = (sum_by_row(values, model.W_dec, pairs, len(raw)) + model.b_dec) * scale
        latents.append(pairs.latents.int().cpu())
        acts.append((values * scale).cpu())
        l0s.append(torch.bincount(pairs.rows, minlength=len(raw)).float().cpu())
        norms.append(raw.norm(dim=-1).cpu())
        cosines.append(functional.cosine_similarity(raw, x_hat, dim=-1).cpu())
        squared += float((raw - x_hat).double().square().sum())
        total_square += float(raw.double().square().sum())
        total += raw.double().sum(0).cpu()
        rows, pairs_held = rows + len(raw), pairs_held + len(values)
        if pairs_held > _MOST_PAIRS:
            break
    variance = total_square - float(total.square().sum()) / rows
    l0, norm = torch.cat(l0s), torch.cat(norms)
    statistics = _statistics(torch.cat(latents), torch.cat(acts), l0.long(), model.d_sae)
    figures = {
        "explained_variance": 1 - squared / variance, "cosine": float(torch.cat(cosines).mean()),
        "l0": float(l0.mean()), "dead_share": float((statistics.firing_share == 0).float().mean()), "rows": rows,
    }  # fmt: skip
    return Measured(statistics, {"norm": _percentiles(norm), "l0": _percentiles(l0)}, figures)


def _percentiles(values: torch.Tensor) -> dict[str, float]:
    ordered = values.sort().values
    return {f"p{p:02d}": float(ordered[round((len(ordered) - 1) * p / 100)]) for p in (1, 50, 99)}


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
    offsets, rivals = _rivals(latents, acts > STRONG * p99[latents].clamp_min(1e-9), l0, d_sae)
    return FeatureStatistics(counts.float() / len(l0), p99, offsets, rivals)


def _rivals(
    latents: torch.Tensor, strong: torch.Tensor, l0: torch.Tensor, d_sae: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """CSR of rivals among the commonest features; `strong` bool [P]: the firings that count."""
    share = torch.bincount(latents[strong], minlength=d_sae).float() / len(l0)
    common = share.topk(min(_MOST_COMMON, d_sae)).indices
    common = common[share[common] >= 0.01].sort().values
    place = torch.full((d_sae,), -1)
    place[common] = torch.arange(len(common))
    together = torch.zeros(len(common), len(common))
    ends = l0.cumsum(0)
    for first in range(0, len(l0), 4096):
        last = min(first + 4096, len(l0))
        begin = int(ends[first] - l0[first])
        part = slice(begin, int(ends[last - 1]))
        rows = torch.repeat_interleave(torch.arange(last - first), l0[first:last])
        columns = place[latents[part]]
        kept = strong[part] & (columns >= 0)
        fires = torch.zeros(last - first, len(common))
        fires[rows[kept], columns[kept]] = 1
        together += fires.T @ fires
    pairs = rivals_from_counts(together, len(l0)).nonzero()
    per_feature = torch.zeros(d_sae, dtype=torch.int64)
    per_feature[common] = torch.bincount(pairs[:, 0], minlength=len(common))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), per_feature.cumsum(0)])
    return offsets, common[pairs[:, 1]].int()


def save(model: Autoencoder, directory: Path, scale: float, k: int, dtype: torch.dtype, measured: Measured,
         metadata: dict[str, Any]) -> None:  # fmt: skip
    """Write sae_weights.safetensors, feature_statistics.safetensors and, last, cfg.json (see docs/bundles.md).

    Raises:
        JobError: there is no room.
    """
    architecture = "batchtopk" if model.architecture == "matryoshka" else model.architecture
    weights = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in model.folded(scale).items()}
    _save_tensors(weights, directory / "sae_weights.safetensors")
    del weights
    tensors = {name: tensor.contiguous() for name, tensor in measured.statistics._asdict().items()}
    _save_tensors(tensors, directory / "feature_statistics.safetensors")
    card = {
        "architecture": architecture, "d_in": model.d_in, "d_sae": model.d_sae,
        **({"k": k} if "topk" in architecture else {}), "dtype": str(dtype).removeprefix("torch."),
        "apply_b_dec_to_input": model.architecture != "standard", "normalize_activations": "none",
        "metadata": {**metadata, "embedding_statistics": measured.embedding_statistics},
    }  # fmt: skip
    write_json(directory / "cfg.json", card)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write whole or not at all."""
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        save_file(tensors, part)
        part.replace(path)
    except Exception as error:
        part.unlink(missing_ok=True)
        raise JobError(f"{path}: could not be written ({error}); make room and run the same command again") from None
