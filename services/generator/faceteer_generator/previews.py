"""Rough pictures from half-denoised latents.

Knows nothing of when one is wanted.

A preview is MoVQ's picture of the estimated clean latents, averaged down to at most 128 pixels a side first: MoVQ's
cost goes with the area, and at 512 pixels a whole decoding takes longer than a denoising step. A linear map from
latents to colours would be cheaper still, but has to be fitted to every bundle.
"""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

PREVIEW_SIDE = 128


def reduced(latents: torch.Tensor, scale: int, side: int = PREVIEW_SIDE) -> torch.Tensor:
    """Latents [n, c, h, w] averaged down until their picture has at most ``side`` pixels in both directions.

    Args:
        latents: an estimate of clean latents.
        scale: pixels to a latent, each way; the result's sides are multiples of it.
        side: pixels.
    """
    height, width = latents.shape[-2:]
    shrink = max(height, width) * scale / side
    if shrink <= 1:
        return latents
    size = [max(scale, int(length / shrink) // scale * scale) for length in (height, width)]
    return interpolate(latents.float(), size=size, mode="area").to(latents.dtype)
