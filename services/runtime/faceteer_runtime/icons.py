"""A feature's icon: what turning it up causes, as one strip of pictures, named by everything that it depends on.

The job that draws icons in bulk and the service that draws one on demand both use this module,
so that each finds what the other made.

The template (an embedding that looks like nothing in particular) is drawn unedited at the left; to the right of it the
feature is SWITCHed on at each of :data:`STRENGTHS`, in SCALED units: its rivals are off, since a picture that is told
to be red and green at once comes out as anything. Every picture has a seed and a noise of its own, the same for all in
the strip, so that what changes is what the feature changes.
"""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image

from faceteer_runtime.cache_keys import IMAGE, cache_key, content_hash

STRENGTHS = (0.5, 1.0, 1.5)
SEED = 1
_STEPS, _GUIDANCE = 12, 4.0
# The fact in a library's meta: the template's embedding, packed by `pack_template`.
TEMPLATE = "icon_template"
_GAP = 2
_LARGEST = 256


def icon_key(
    generator_revision: str,
    sae_revision: str,
    template: np.ndarray,
    feature: int,
    *,
    strengths: Sequence[float] = STRENGTHS,
    steps: int,
    guidance: float,
    size: tuple[int, int],
    seed: int = SEED,
) -> str:
    """The content address of an icon, which is also its cache key.

    Args:
        generator_revision, sae_revision: of the parts that draw and edit.
        template: float32 [d], as :func:`unpack_template` gives it back.
        feature: its index.
        strengths: SCALED, left to right.
        steps, guidance, size, seed: as each picture is drawn; size is (width, height).
    """
    return cache_key(
        IMAGE,
        f"{generator_revision}+{sae_revision}",
        b"icon-switch",
        np.ascontiguousarray(template, "<f4").tobytes(),
        struct.pack("<IIdIIQ", feature, steps, guidance, *size, seed),
        np.asarray(strengths, "<f8").tobytes(),
    )


def icon_drawing(default_steps: int, default_guidance: float) -> tuple[int, float]:
    """Steps and guidance of an icon's pictures: 12 and 4, as the work that this continues drew its icons, or the
    bundle's own defaults where those are lower."""
    return min(_STEPS, default_steps), min(_GUIDANCE, default_guidance)


def icon_strip(pictures: Sequence[Image.Image]) -> bytes:
    """The pictures side by side, template first, as a WebP file; larger ones are scaled down to 256 pixels' height."""
    height = min(_LARGEST, max(picture.height for picture in pictures))
    scaled = [
        picture.convert("RGB").resize((max(1, round(picture.width * height / picture.height)), height))
        if picture.height != height
        else picture.convert("RGB")
        for picture in pictures
    ]
    width = sum(picture.width for picture in scaled) + _GAP * (len(scaled) - 1)
    strip = Image.new("RGB", (width, height), "white")
    left = 0
    for picture in scaled:
        strip.paste(picture, (left, 0))
        left += picture.width + _GAP
    buffer = io.BytesIO()
    strip.save(buffer, "WEBP", quality=90, method=4)
    return buffer.getvalue()


def icon_pictures(strip: bytes, count: int) -> list[Image.Image]:
    """The ``count`` pictures of a strip, template first."""
    whole = Image.open(io.BytesIO(strip)).convert("RGB")
    width = (whole.width - _GAP * (count - 1)) / count
    lefts = [round(place * (width + _GAP)) for place in range(count)]
    return [whole.crop((left, 0, left + round(width), whole.height)) for left in lefts]


def pack_template(embeds: np.ndarray) -> str:
    """An embedding [d] as text: float16, base64."""
    return base64.b64encode(np.asarray(embeds, "<f2").tobytes()).decode()


def unpack_template(packed: str) -> np.ndarray:
    """The embedding, float32 [d]. Raises ValueError where the text is none."""
    embeds = np.frombuffer(base64.b64decode(packed, validate=True), "<f2").astype(np.float32)
    if len(embeds) == 0 or not np.isfinite(embeds).all():
        raise ValueError("the icon template holds no finite values")
    return embeds


def template_id(template: np.ndarray) -> str:
    """A short name of a template, for people."""
    return content_hash(np.ascontiguousarray(template, "<f4").tobytes())[:12]
