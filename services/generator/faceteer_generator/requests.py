"""What is asked for: settings, the limits that they are checked against, and the images that they mean."""

from __future__ import annotations

import math
import re
import secrets
import struct
from dataclasses import dataclass
from typing import Literal

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
class AskedSettings:
    """Settings as a request gives them: zero, None and no seeds mean the bundle's own. ``quality`` 0 is lossless."""

    width: int = 0
    height: int = 0
    steps: int = 0
    guidance_scale: float | None = None
    seeds: tuple[int, ...] = ()
    scheduler: str | None = None
    format: Format = "png"
    quality: int = 0


@dataclass(frozen=True)
class AskedStart:
    """What to start from as a request gives it: an image's file or the id of inverted noise."""

    image: bytes | None = None
    noise_id: str | None = None
    strength: float | None = None


@dataclass(frozen=True)
class ImageStart:
    """Image to image: the image with noise of the timestep at which ``strength`` of the steps are left.

    Attributes:
        pixels: uint8 [height, width, 3], of the size drawn.
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
class ImageSpec:
    """All that the pixels of one image depend on, besides the decoder.

    Attributes:
        embeds: float32 [d].
        negative: float32 [d], what guidance steers away from; None for the bundle's own.
        width: pixels.
        height: pixels.
        steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 or less draws without.
        scheduler: one of :data:`SCHEDULERS`.
        seed: of this image's own noise, 0 to 2**64 - 1.
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
        # Rounded as in KandinskyV22Img2ImgPipeline; a strength arrives as float32, in which 0.7 is slightly less.
        return self.steps - min(max(1, int(self.steps * round(self.start.strength, 6))), self.steps)

    @property
    def run_steps(self) -> int:
        """Steps that run."""
        return self.steps - self.first_step


@dataclass(frozen=True)
class GenerationSettings:
    """Settings in force for one request: defaults filled in, limits checked. ``quality`` 0 is lossless."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    seeds: tuple[int, ...]
    scheduler: str
    format: Format
    quality: int

    def images(
        self, embeds: np.ndarray, negative: np.ndarray | None, start: ImageStart | NoiseStart | None = None
    ) -> list[ImageSpec]:
        """One image for each seed."""
        size = (self.width, self.height)
        return [
            ImageSpec(embeds, negative, *size, self.steps, self.guidance_scale, self.scheduler, seed, start)
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
        max_pixels: most pixels of such an image.
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
        """Whether images of this size are drawn."""
        if (width, height) in self.sizes:
            return True
        multiple = self.size_multiple
        return multiple > 0 and width % multiple == height % multiple == 0 and 0 < width * height <= self.max_pixels

    def settle(self, asked: AskedSettings) -> GenerationSettings:
        """Fills defaults in, and picks a seed where there is none.

        Raises:
            InvalidField: a value is out of range.
        """
        width, height = asked.width or self.sizes[0][0], asked.height or self.sizes[0][1]
        if not self.serves(width, height):
            served = ", ".join(f"{w} x {h}" for w, h in self.sizes)
            if self.size_multiple:
                served += f", and multiples of {self.size_multiple} up to {self.max_pixels} pixels in all"
            raise InvalidField("settings.width", f"{width} x {height} is not served; sizes are {served}")
        steps, scheduler = asked.steps or self.steps, asked.scheduler or self.scheduler
        most = min(self.max_steps, LCM_MAX_STEPS) if scheduler == "lcm" else self.max_steps
        if steps > most:
            raise InvalidField("settings.steps", f"must be 1 to {most}, not {steps}")
        guidance = self.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
        if not (math.isfinite(guidance) and 0 <= guidance <= MAX_GUIDANCE):
            raise InvalidField("settings.guidance_scale", f"must be 0 to {MAX_GUIDANCE:g}, not {guidance:g}")
        if len(asked.seeds) > self.max_seeds:
            raise InvalidField("settings.seeds", f"at most {self.max_seeds} in one request, not {len(asked.seeds)}")
        if asked.quality > 100:
            raise InvalidField("settings.quality", f"must be 0 to 100, not {asked.quality}")
        # Small enough to type, and exact in JavaScript's numbers.
        seeds = asked.seeds or (secrets.randbelow(2**32),)
        return GenerationSettings(width, height, steps, float(guidance), seeds, scheduler, asked.format, asked.quality)


def image_key(revision: str, precision: str, spec: ImageSpec, format: Format, quality: int) -> str:
    """The cache key of a finished file: everything that its bytes depend on.

    Args:
        revision: of the generator part.
        precision: device kind and dtype of the models, because they change the last bits.
        spec: what is drawn.
        format: of the file.
        quality: of a WebP file; 0 and 100 are both lossless.
    """
    embeds, guidance, negative = _conditions(spec)
    start, seed = spec.start, spec.seed
    origin: tuple[bytes, ...] = ()
    if isinstance(start, ImageStart):
        origin = (b"image", start.digest.encode(), struct.pack("<I", spec.run_steps))
    elif isinstance(start, NoiseStart):
        # Nothing is random any more: all seeds give one image.
        origin, seed = (b"noise", start.noise_id.encode()), 0
    return cache_key(
        IMAGE,
        revision,
        precision.encode(),
        embeds,
        negative,
        struct.pack("<IIIdQ", spec.width, spec.height, spec.steps, guidance, seed),
        spec.scheduler.encode(),
        format.encode(),
        bytes([quality % 100 if format == "webp" else 0]),
        *origin,
    )


def noise_id(revision: str, precision: str, spec: ImageSpec) -> str:
    """The name of the noise that inverting ``spec.start``, an image, gives: from everything that it depends on."""
    assert isinstance(spec.start, ImageStart)
    embeds, guidance, negative = _conditions(spec)
    digest = content_hash(
        precision.encode(),
        spec.start.digest.encode(),
        embeds,
        negative,
        struct.pack("<IIId", spec.width, spec.height, spec.steps, guidance),
    )
    return f"{revision}-{digest}"


def _conditions(spec: ImageSpec) -> tuple[bytes, float, bytes]:
    """The decoder's conditions, for keys: embeds, guidance, negative. Without guidance the last two do not matter."""
    embeds = np.ascontiguousarray(spec.embeds, dtype="<f4").tobytes()
    if not spec.guided:
        return embeds, 1.0, b""
    negative = b"" if spec.negative is None else np.ascontiguousarray(spec.negative, dtype="<f4").tobytes()
    return embeds, spec.guidance_scale, negative


def noise_key(noise_id: str) -> str:
    """The cache key of Record {"noise": float32 [c, h, w], "made_for": int32 [width, height, steps]}.

    An id comes from outside: one without an id's form gets a key too, of bounded length, under which nothing is stored.
    """
    if not _NOISE_ID.match(noise_id):
        return cache_key(NOISE, "none", noise_id.encode())
    revision, _, digest = noise_id.rpartition("-")
    return f"faceteer:{SCHEMA}:{NOISE}:{revision}:{digest}"
