"""Things to draw in tests of the generator."""

from __future__ import annotations

from typing import Any

import numpy as np
from faceteer_generator.requests import ImageSpec
from tiny_bundle import EMBED_DIM


def embeds_of(seed: int) -> np.ndarray:
    """Random embeds, [d] float32, of a norm that a trained encoder might give."""
    return (5 * np.random.default_rng(seed).standard_normal(EMBED_DIM)).astype(np.float32)


def image_spec(number: int = 1, **changes: Any) -> ImageSpec:
    """A drawing of the embeds and seed of this number."""
    fields: dict[str, Any] = {
        "embeds": embeds_of(number),
        "negative": None,
        "width": 64,
        "height": 64,
        "steps": 4,
        "guidance_scale": 2.0,
        "scheduler": "ddim",
        "seed": number,
    }
    return ImageSpec(**(fields | changes))
