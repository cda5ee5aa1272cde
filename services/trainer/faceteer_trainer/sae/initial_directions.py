"""Initial directions for a sparse autoencoder: differences of near neighbours, and directions of great skewness.

A feature that is on for a few pictures and off for the rest makes its projection skewed to one side; a mixture of
features is less skewed than each of them. So directions of greatest skewness are single features: projection pursuit by
the one-unit rule of FastICA with the third moment (Hyvärinen 1999). Latents that start there do not have to untangle
conjunctions first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Skewed(NamedTuple):
    """Directions found, the most skewed first: s of them."""

    encoder: torch.Tensor  # [s, d]: projections encoder @ x are in units of the decoder's directions
    decoder: torch.Tensor  # [s, d], norm 1
    skewness: torch.Tensor  # [s]


@torch.no_grad()
def skewed_directions(
    embeds: torch.Tensor, most: int, seed: int = 0, tries: int = 512, rounds: int = 60, sample: int = 16_000,
    explained: float = 0.98, least_skewness: float = 0.3, shift: float = 1.0,
) -> Skewed:  # fmt: skip
    """Up to `most` distinct directions of locally greatest skewness in embeds [m, d].

    Embeddings are whitened within the principal components that explain `explained` of the variance; the rest is too
    faint to hold a feature of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    x = embeds[torch.randperm(len(embeds), generator=generator)[:sample]].double()
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    order = values.argsort(descending=True)
    values, vectors = values[order].clamp_min(1e-12), vectors[:, order]
    rank = int((values.cumsum(0) / values.sum() < explained).sum()) + 1
    whiten = vectors[:, :rank] / values[:rank].sqrt()  # [d, r]
    z = x @ whiten
    # from near neighbours' differences: a random start in many dimensions would miss the less skewed features
    w = neighbour_directions(embeds, tries, 5, seed).double() @ whiten
    w = torch.nn.functional.normalize(w, dim=-1).T
    for _ in range(rounds):
        # the added w keeps the ascent from leaping between neighbouring maxima (Kolda and Mayo 2011)
        w = torch.nn.functional.normalize(z.T @ (z @ w).square() / len(z) + shift * w, dim=0)
    skewness = (z @ w).pow(3).mean(0)
    chosen: list[int] = []
    for candidate in skewness.argsort(descending=True).tolist():
        if len(chosen) == most or skewness[candidate] < least_skewness:
            break
        if not chosen or (w[:, chosen].T @ w[:, candidate]).max() < 0.9:
            chosen.append(candidate)
    w = w[:, chosen]
    decoder = (x.T @ (z @ w) / len(x)).T  # regression of x on each projection
    length = decoder.norm(dim=-1, keepdim=True)
    return Skewed((whiten @ w * length.T).T.float(), (decoder / length).float(), skewness[chosen].float())


@torch.no_grad()
def neighbour_directions(
    embeds: torch.Tensor, count: int, rank: int = 5, seed: int = 0, sample: int = 4096
) -> torch.Tensor:
    """`count` unit directions [count, d] that each lead to a row of `embeds` from its neighbour of this rank.

    Near neighbours differ in little, so their difference is close to a single feature where a whole embedding is a sum
    of many. Chosen greedily from `sample` differences: each next one is least like those chosen (farthest point). Where
    there are too few rows, the rest are random directions.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(embeds), generator=generator)[:sample]
    near = []
    for chunk in rows.split(256):
        distances = torch.cdist(embeds[chunk], embeds)
        near.append(distances.topk(min(rank + 1, len(embeds)), largest=False).indices[:, -1])
    candidates = torch.nn.functional.normalize(embeds[rows] - embeds[torch.cat(near)], dim=-1)
    chosen = [0]
    likeness = candidates @ candidates[0]
    while len(chosen) < min(count, len(candidates)):
        chosen.append(int(likeness.argmin()))
        likeness = torch.maximum(likeness, candidates @ candidates[chosen[-1]])
    directions = candidates[chosen]
    if len(directions) < count:
        spare = torch.randn(count - len(directions), embeds.shape[1], generator=generator)
        directions = torch.cat([directions, torch.nn.functional.normalize(spare, dim=-1)])
    return directions
