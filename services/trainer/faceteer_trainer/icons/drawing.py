"""Draws icons in bulk: the template, and the template with one feature set to each strength.

Knows nothing of libraries or labels. Every picture is denoised from a noise of its own, seeded alike, whatever else is
in the batch; so an icon is the same picture wherever and with whichever others it is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from faceteer_generator.denoise import Denoiser
from faceteer_generator.requests import Drawing
from faceteer_runtime.icons import icon_key, icon_strip
from faceteer_sae.model import SparseAutoencoder
from PIL import Image

from faceteer_trainer.errors import JobError

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class IconSettings:
    """How icons are drawn; part of every icon's content address.

    Attributes:
        strengths: SCALED, left to right.
        steps, guidance: of each picture.
        size: (width, height) of each picture.
        scheduler: a name the generator knows.
        seed: of every picture's noise.
        batch: pictures denoised together; no part of the address.
    """

    strengths: tuple[float, ...]
    steps: int
    guidance: float
    size: tuple[int, int]
    scheduler: str
    seed: int
    batch: int = 24


def edited(sae: SparseAutoencoder, template: Floats, feature: int, strengths: Sequence[float], p99: float) -> Floats:
    """The template with the feature set to each strength, float32 [s, d]: ``x + (v - f(x)) d``."""
    (active,) = sae.encode(template[None])
    index = np.array([feature])
    before = float(active.at(index)[0])
    direction = sae.directions(index)[0]
    values = np.asarray(strengths, np.float32) * np.float32(p99)
    return np.asarray(template + (values - before)[:, None] * direction, np.float32)


def address(settings: IconSettings, generator_revision: str, sae_revision: str, template: Floats, feature: int) -> str:
    """The icon's content address."""
    return icon_key(
        generator_revision,
        sae_revision,
        template,
        feature,
        strengths=settings.strengths,
        steps=settings.steps,
        guidance=settings.guidance,
        size=settings.size,
        seed=settings.seed,
    )


def draw_icons(
    denoiser: Denoiser,
    sae: SparseAutoencoder,
    features: Sequence[tuple[int, float, Floats]],
    settings: IconSettings,
) -> Iterator[tuple[int, bytes]]:
    """(feature, WebP strip) for each (feature, p99, template), a batch at a time.

    Raises:
        JobError: a picture cannot be drawn.
    """
    plain: dict[bytes, npt.NDArray[np.uint8]] = {}
    each = max(1, settings.batch // len(settings.strengths))
    for start in range(0, len(features), each):
        group = features[start : start + each]
        for _, _, template in group:
            if template.tobytes() not in plain:
                (plain[template.tobytes()],) = _draw(denoiser, [template], settings)
        embeds = [row for feature, p99, x in group for row in edited(sae, x, feature, settings.strengths, p99)]
        pictures = _draw(denoiser, embeds, settings)
        for place, (feature, _, template) in enumerate(group):
            own = pictures[place * len(settings.strengths) : (place + 1) * len(settings.strengths)]
            yield feature, icon_strip([Image.fromarray(pixels) for pixels in (plain[template.tobytes()], *own)])


def _draw(denoiser: Denoiser, embeds: Sequence[Floats], settings: IconSettings) -> list[npt.NDArray[np.uint8]]:
    width, height = settings.size
    pictures = [
        denoiser.begin(
            Drawing(row, None, width, height, settings.steps, settings.guidance, settings.scheduler, settings.seed)
        )
        for row in embeds
    ]
    while any(not picture.done for picture in pictures):
        denoiser.step(pictures)
        for picture in pictures:
            if picture.error is not None:
                raise JobError(f"an icon cannot be drawn: {picture.error}")
    return denoiser.decode([picture.latents for picture in pictures])
