"""What is asked for: the settings of a generation, and the limits that they are checked against.

Knows nothing of gRPC, of torch, and of how a picture is drawn.
"""

from __future__ import annotations

import math
import re
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from faceteer_runtime.bundle import BundleError, BundlePart
from faceteer_runtime.cache_keys import IMAGE, NOISE, SCHEMA, cache_key, content_hash
from faceteer_runtime.errors import InvalidField

SCHEDULERS = ("ddpm", "ddim", "dpm_solver_pp", "lcm")
MAX_GUIDANCE = 30.0
# LCMScheduler distils this many steps (its original_inference_steps) and refuses more.
LCM_MAX_STEPS = 50

DEFAULT_STRENGTH = 0.7
_NOISE_ID = re.compile(r"[A-Za-z0-9_.+]{1,64}-[0-9a-f]{64}\Z")

Format = Literal["png", "webp"]


@dataclass(frozen=True)
class ImageStart:
    """Image to image: the picture with noise of the timestep at which ``strength`` of the steps are left.

    Attributes:
        pixels: uint8 [height, width, 3], of the drawing's size.
        strength: share of the steps that run, in (0, 1].
        digest: SHA-256 of the pixels.
    """

    pixels: np.ndarray
    strength: float
    digest: str

    @classmethod
    def of(cls, pixels: np.ndarray, strength: float = DEFAULT_STRENGTH) -> ImageStart:
        """With its digest."""
        return cls(pixels, strength, content_hash(repr(pixels.shape).encode(), np.ascontiguousarray(pixels).tobytes()))


@dataclass(frozen=True)
class NoiseStart:
    """The noise that an inversion found.

    Attributes:
        noise: float32 [c, h, w].
        noise_id: its name.
    """

    noise: np.ndarray
    noise_id: str


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
        start: what it starts from instead of that noise; None for nothing else.
    """

    embeds: np.ndarray
    negative: np.ndarray | None
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str
    seed: int
    start: ImageStart | NoiseStart | None = None

    @property
    def guided(self) -> bool:
        """Whether the decoder runs twice a step, as KandinskyV22Pipeline decides it."""
        return self.guidance_scale > 1

    @property
    def first_step(self) -> int:
        """The step it starts at: those before are left out when it starts from an image. At least one runs."""
        if not isinstance(self.start, ImageStart):
            return 0
        # As KandinskyV22Img2ImgPipeline rounds; a strength came as float32, in which 0.7 is a little less.
        return self.steps - min(max(1, int(self.steps * round(self.start.strength, 6))), self.steps)

    @property
    def run_steps(self) -> int:
        """Steps that run."""
        return self.steps - self.first_step


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

    def drawings(
        self, embeds: np.ndarray, negative: np.ndarray | None, start: ImageStart | NoiseStart | None = None
    ) -> list[Drawing]:
        """One drawing for each seed."""
        size = (self.width, self.height)
        return [
            Drawing(embeds, negative, *size, self.steps, self.guidance_scale, self.scheduler, seed, start)
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
        size_multiple: pixels; other widths and heights are served too if they are multiples of this; 0 for none.
        max_pixels: most pixels of such a picture.
    """

    sizes: tuple[tuple[int, int], ...]
    steps: int
    guidance_scale: float
    scheduler: str
    max_steps: int
    max_seeds: int
    size_multiple: int = 0
    max_pixels: int = 0

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
            multiple, pixels = int(facts.get("size_multiple", 0)), int(facts.get("max_pixels", 0))
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{part.path}: the generator part of bundle.json needs sizes, steps, guidance_scale and scheduler"
                f" ({type(error).__name__}: {error})"
            ) from None
        if not sizes or min(map(min, sizes)) < 1 or steps < 1 or not 0 <= guidance <= MAX_GUIDANCE:
            raise BundleError(f"{part.path}: sizes, steps or guidance_scale in bundle.json are out of range")
        if scheduler not in SCHEDULERS:
            raise BundleError(f"{part.path}: scheduler {scheduler!r} in bundle.json is none of {', '.join(SCHEDULERS)}")
        if multiple < 0 or (multiple > 0) != (pixels > 0) or 0 < pixels < multiple**2:
            raise BundleError(
                f"{part.path}: size_multiple and max_pixels in bundle.json come together, and max_pixels must hold a"
                " picture of that size"
            )
        return cls(sizes, steps, guidance, scheduler, max(max_steps, steps), max_seeds, multiple, pixels)

    def serves(self, width: int, height: int) -> bool:
        """Whether pictures of this size are drawn."""
        if (width, height) in self.sizes:
            return True
        multiple = self.size_multiple
        return multiple > 0 and width % multiple == height % multiple == 0 and 0 < width * height <= self.max_pixels

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
        if not self.serves(width, height):
            served = ", ".join(f"{w} x {h}" for w, h in self.sizes)
            if self.size_multiple:
                served += f", and multiples of {self.size_multiple} up to {self.max_pixels} pixels in all"
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
    start, seed = drawing.start, drawing.seed
    origin: tuple[bytes, ...] = ()
    if isinstance(start, ImageStart):
        origin = (b"image", start.digest.encode(), struct.pack("<I", drawing.run_steps))
    elif isinstance(start, NoiseStart):
        # Nothing is random any more: all seeds are one picture.
        origin, seed = (b"noise", start.noise_id.encode()), 0
    numbers: tuple[Any, ...] = (drawing.width, drawing.height, drawing.steps, guidance, seed)
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
        *origin,
    )


def noise_id(revision: str, precision: str, drawing: Drawing) -> str:
    """The name of the noise that inverting ``drawing.start``, an image, gives: from everything that it depends on."""
    assert isinstance(drawing.start, ImageStart)
    guidance, negative = (drawing.guidance_scale, drawing.negative) if drawing.guided else (1.0, None)
    digest = content_hash(
        precision.encode(),
        drawing.start.digest.encode(),
        np.ascontiguousarray(drawing.embeds, dtype="<f4").tobytes(),
        b"" if negative is None else np.ascontiguousarray(negative, dtype="<f4").tobytes(),
        struct.pack("<IIId", drawing.width, drawing.height, drawing.steps, guidance),
    )
    return f"{revision}-{digest}"


def noise_key(noise_id: str) -> str:
    """The cache key of Record {"noise": float32 [c, h, w], "made_for": int32 [width, height, steps]}.

    An id comes from outside: one without an id's form gets a key too, of bounded length, under which nothing lies.
    """
    if not _NOISE_ID.match(noise_id):
        return cache_key(NOISE, "none", noise_id.encode())
    revision, _, digest = noise_id.rpartition("-")
    return f"faceteer:{SCHEMA}:{NOISE}:{revision}:{digest}"
