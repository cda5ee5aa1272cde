"""What is asked for: the settings of a generation, and the limits that they are checked against.

Knows nothing of gRPC, of torch, and of how a picture is drawn.
"""

from __future__ import annotations

import math
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from faceteer_runtime.bundle import BundleError, BundlePart
from faceteer_runtime.cache_keys import IMAGE, cache_key
from faceteer_runtime.errors import InvalidField

SCHEDULERS = ("ddpm", "ddim", "dpm_solver_pp", "lcm")
MAX_GUIDANCE = 30.0
# LCMScheduler distils this many steps (its original_inference_steps) and refuses more.
LCM_MAX_STEPS = 50

Format = Literal["png", "webp"]


@dataclass(frozen=True)
class Drawing:
    """All that the pixels of one picture depend on, besides the decoder.

    Attributes:
        embeds: float32 [d].
        negative: float32 [d], what guidance steers away from; None for the bundle's own.
        width: pixels.
        height: pixels.
        steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 or less draws without.
        scheduler: one of :data:`SCHEDULERS`.
        seed: of this picture's own noise, 0 to 2**64 - 1.
    """

    embeds: np.ndarray
    negative: np.ndarray | None
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str
    seed: int

    @property
    def guided(self) -> bool:
        """Whether the decoder runs twice a step, as KandinskyV22Pipeline decides it."""
        return self.guidance_scale > 1


@dataclass(frozen=True)
class Generation:
    """Settings in force for one request: defaults filled in, limits checked. ``quality`` 0 is lossless."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    seeds: tuple[int, ...]
    scheduler: str
    format: Format
    quality: int

    def drawings(self, embeds: np.ndarray, negative: np.ndarray | None) -> list[Drawing]:
        """One drawing for each seed."""
        return [
            Drawing(embeds, negative, self.width, self.height, self.steps, self.guidance_scale, self.scheduler, seed)
            for seed in self.seeds
        ]


@dataclass(frozen=True)
class Limits:
    """The bundle's defaults, and what a request may ask for.

    Attributes:
        sizes: (width, height) pairs served, the default first.
        steps: default.
        guidance_scale: default.
        scheduler: default, one of :data:`SCHEDULERS`.
        max_steps: most steps in a request.
        max_seeds: most seeds in a request.
    """

    sizes: tuple[tuple[int, int], ...]
    steps: int
    guidance_scale: float
    scheduler: str
    max_steps: int
    max_seeds: int

    @classmethod
    def of_bundle(cls, part: BundlePart, *, max_steps: int, max_seeds: int) -> Limits:
        """Reads the defaults in ``bundle.json``.

        Raises:
            BundleError: a fact is missing or makes no sense.
        """
        facts = part.facts
        try:
            sizes = tuple((int(width), int(height)) for width, height in facts["sizes"])
            steps, guidance, scheduler = int(facts["steps"]), float(facts["guidance_scale"]), str(facts["scheduler"])
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{part.path}: the generator part of bundle.json needs sizes, steps, guidance_scale and scheduler"
                f" ({type(error).__name__}: {error})"
            ) from None
        if not sizes or min(map(min, sizes)) < 1 or steps < 1 or not 0 <= guidance <= MAX_GUIDANCE:
            raise BundleError(f"{part.path}: sizes, steps or guidance_scale in bundle.json are out of range")
        if scheduler not in SCHEDULERS:
            raise BundleError(f"{part.path}: scheduler {scheduler!r} in bundle.json is none of {', '.join(SCHEDULERS)}")
        return cls(sizes, steps, guidance, scheduler, max(max_steps, steps), max_seeds)

    def settle(
        self,
        *,
        width: int = 0,
        height: int = 0,
        steps: int = 0,
        guidance_scale: float | None = None,
        seeds: Sequence[int] = (),
        scheduler: str | None = None,
        format: Format = "png",
        quality: int = 0,
    ) -> Generation:
        """Fills defaults in for zeros and None, and picks a seed where there is none.

        Raises:
            InvalidField: a value is out of range.
        """
        width, height = width or self.sizes[0][0], height or self.sizes[0][1]
        if (width, height) not in self.sizes:
            served = ", ".join(f"{w} x {h}" for w, h in self.sizes)
            raise InvalidField("settings.width", f"{width} x {height} is not served; sizes are {served}")
        steps, scheduler = steps or self.steps, scheduler or self.scheduler
        most = min(self.max_steps, LCM_MAX_STEPS) if scheduler == "lcm" else self.max_steps
        if steps > most:
            raise InvalidField("settings.steps", f"must be 1 to {most}, not {steps}")
        guidance = self.guidance_scale if guidance_scale is None else guidance_scale
        if not (math.isfinite(guidance) and 0 <= guidance <= MAX_GUIDANCE):
            raise InvalidField("settings.guidance_scale", f"must be 0 to {MAX_GUIDANCE:g}, not {guidance:g}")
        if len(seeds) > self.max_seeds:
            raise InvalidField("settings.seeds", f"at most {self.max_seeds} in one request, not {len(seeds)}")
        if quality > 100:
            raise InvalidField("settings.quality", f"must be 0 to 100, not {quality}")
        # Small enough to be typed, and to survive JavaScript.
        chosen = tuple(seeds) or (secrets.randbelow(2**32),)
        return Generation(width, height, steps, float(guidance), chosen, scheduler, format, quality)


def image_key(revision: str, precision: str, drawing: Drawing, format: Format, quality: int) -> str:
    """The cache key of a finished file: everything that its bytes depend on.

    Args:
        revision: of the generator part.
        precision: device kind and dtype of the models, because they change the last bits.
        drawing: what is drawn; without guidance the negative plays no part.
        format: of the file.
        quality: of a WebP file; 0 and 100 are both lossless.
    """
    guidance, negative = (drawing.guidance_scale, drawing.negative) if drawing.guided else (1.0, None)
    numbers: tuple[Any, ...] = (drawing.width, drawing.height, drawing.steps, guidance, drawing.seed)
    return cache_key(
        IMAGE,
        revision,
        precision.encode(),
        np.ascontiguousarray(drawing.embeds, dtype="<f4").tobytes(),
        b"" if negative is None else np.ascontiguousarray(negative, dtype="<f4").tobytes(),
        struct.pack("<IIIdQ", *numbers),
        drawing.scheduler.encode(),
        format.encode(),
        bytes([quality % 100 if format == "webp" else 0]),
    )
