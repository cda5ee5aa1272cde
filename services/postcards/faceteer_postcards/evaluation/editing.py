"""Edits as the product makes them: x' = x + sum over edited features of (v_i - f_i(x)) d_i, in SCALED units."""

from __future__ import annotations

from typing import NamedTuple

import torch
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


@torch.no_grad()
def transfer(sae: Autoencoder, source: torch.Tensor, target: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
    """`onto` [n, d] plus the difference of features that leads from `source` to `target`, row by row."""
    return onto + (sae.encode(target) - sae.encode(source)) @ sae.W_dec
