"""What each feature does on a corpus: how often it fires, how strongly, and which features it never fires with.

Everything here is found from activations alone; no label, caption or ground truth is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

STRONG = 0.3  # of its own p99: a feature that only flickers does not count as firing together with another


class FeatureStatistics(NamedTuple):
    """One row a feature, n features."""

    firing_share: torch.Tensor  # f32 [n]: the share of pictures in which it fires
    p99: torch.Tensor  # f32 [n]: 99th percentile of its activation where it fires; 0 if it never does
    rivals_offsets: torch.Tensor  # i64 [n + 1]: feature i's rivals are indices[offsets[i] : offsets[i + 1]]
    rivals_indices: torch.Tensor  # i32

    def rivals(self, feature: int) -> list[int]:
        """The features that never fire with this one although both are common."""
        start, stop = self.rivals_offsets[feature : feature + 2].tolist()
        return self.rivals_indices[start:stop].tolist()


def find_rivals(fires: torch.Tensor, least_share: float = 0.01, least_expected: float = 20.0,
                most_ratio: float = 0.1) -> torch.Tensor:  # fmt: skip
    """bool [n, n]: pairs that co-fire under `most_ratio` times what independence would give.

    `fires` [m, n] bool. Both must fire in `least_share` of the pictures, and independence must predict at least
    `least_expected` pictures with both, or chance alone could keep them apart.
    """
    found = fires.float()
    return rivals_from_counts(found.T @ found, len(found), least_share, least_expected, most_ratio)


def rivals_from_counts(together: torch.Tensor, rows: int, least_share: float = 0.01, least_expected: float = 20.0,
                       most_ratio: float = 0.1) -> torch.Tensor:  # fmt: skip
    """The same from counts: `together` [n, n] of rows in which both fire, its diagonal those in which each does."""
    share = together.diagonal() / rows
    expected = rows * share[:, None] * share[None]
    common = share >= least_share
    rivals = (together < most_ratio * expected) & (expected >= least_expected) & common[:, None] & common[None]
    return rivals.fill_diagonal_(False)


def measure_features(features: torch.Tensor) -> FeatureStatistics:
    """Statistics of activations [m, n] on a corpus of m pictures."""
    fires = features > 0
    p99 = torch.stack([
        torch.quantile(column[column > 0], 0.99) if bool((column > 0).any()) else column.new_zeros(())
        for column in features.T
    ]).float()  # fmt: skip
    rivals = find_rivals(features > STRONG * p99.clamp_min(1e-9))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), rivals.sum(1).cumsum(0)])
    return FeatureStatistics(fires.float().mean(0), p99, offsets, rivals.nonzero()[:, 1].to(torch.int32))


def embedding_statistics(embeds: torch.Tensor, features: torch.Tensor) -> dict[str, dict[str, float]]:
    """Percentiles of the embeddings' norm and of L0, for the product's input gate."""
    shares = torch.tensor([0.01, 0.5, 0.99])
    names = ("p01", "p50", "p99")
    norms = torch.quantile(embeds.norm(dim=-1), shares).tolist()
    l0 = torch.quantile((features > 0).sum(-1).float(), shares).tolist()
    return {"norm": dict(zip(names, norms, strict=True)), "l0": dict(zip(names, l0, strict=True))}


def save_statistics(statistics: FeatureStatistics, path: Path) -> None:
    """Write feature_statistics.safetensors."""
    save_file({name: tensor.contiguous() for name, tensor in statistics._asdict().items()}, path)


def load_statistics(path: Path) -> FeatureStatistics:
    """Read it back."""
    return FeatureStatistics(**load_file(path))
