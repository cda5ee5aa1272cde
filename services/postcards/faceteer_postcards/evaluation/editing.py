"""Edits as the product makes them: x' = x + sum over edited features of (v_i - f_i(x)) d_i, in SCALED units."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from faceteer_sae.diff import CARRIED_COVERAGE, diff_features, for_another
from faceteer_sae.edits import EditColumns, Unit, check_edits
from faceteer_sae.edits import apply_edits as product_edits
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.statistics import FeatureStatistics
from faceteer_trainer.sae.autoencoder import Autoencoder


class Edit(NamedTuple):
    """Set `feature` to `scaled` times its own 99th percentile; `switch` also ablates its rivals."""

    feature: int
    scaled: float
    switch: bool = False


@torch.no_grad()
def apply_edits(
    sae: Autoencoder, statistics: FeatureStatistics, embeds: torch.Tensor, edits: list[Edit]
) -> torch.Tensor:
    """Embeds [n, d] with the same edits made to each. A later edit wins over an earlier one's ablations and values."""
    features = sae.encode(embeds)
    wanted: dict[int, float] = {}
    for edit in edits:
        if edit.switch:
            wanted.update(dict.fromkeys(statistics.rivals(edit.feature).tolist(), 0.0))
    for edit in edits:  # what is set stays set, whatever another edit's rivals are
        wanted[edit.feature] = edit.scaled * float(statistics.p99[edit.feature])
    indices = torch.tensor(list(wanted), dtype=torch.long)
    values = torch.tensor(list(wanted.values()))
    return embeds + (values - features[:, indices]) @ sae.W_dec[indices]


def transfer(
    sae: SparseAutoencoder,
    statistics: FeatureStatistics,
    source: torch.Tensor,
    target: torch.Tensor,
    onto: torch.Tensor,
    coverage: float = CARRIED_COVERAGE,
) -> torch.Tensor:
    """`onto` [n, d] with what leads from `source` to `target` carried over, row by row, by the product's own code."""
    rows = []
    for a, b, c in zip(source.numpy(), target.numpy(), onto.numpy(), strict=True):
        f_a, f_b, f_c = sae.encode(np.stack([a, b, c]))
        diff = for_another(diff_features(sae, a, b, f_a, f_b, coverage), f_a, f_b, statistics)
        raw = np.full(len(diff.indices), Unit.RAW, np.int64)
        columns = EditColumns(diff.indices, diff.operations, diff.values.astype(np.float64), raw)
        edits = check_edits(columns, d_sae=sae.d_sae, statistics=statistics, max_edits=len(raw))
        rows.append(product_edits(sae, c, edits, f_c.at(edits.indices)).x)
    return torch.from_numpy(np.stack(rows))
