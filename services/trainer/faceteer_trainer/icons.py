"""Icons: pictures of what switching a feature on causes, drawn in bulk from a template.

An icon is the template, and the template with one feature switched on at each strength, its rivals off. Every picture
is denoised from a noise of its own, seeded alike, whatever else is in the batch; so an icon is the same picture
wherever and with whichever others it is drawn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from faceteer_encoder.model import load_encoder
from faceteer_generator.denoise import Denoiser
from faceteer_generator.kandinsky import KandinskyDecoder
from faceteer_generator.model import load_decoder
from faceteer_generator.requests import ImageSpec
from faceteer_library.editor import Described, LibraryEditor
from faceteer_runtime import bundle as bundle_format
from faceteer_runtime.bundle import Bundle
from faceteer_runtime.icons import SEED, STRENGTHS, TEMPLATE, icon_drawing, icon_key, icon_strip, unpack_template
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.statistics import FeatureStatistics, load_statistics
from PIL import Image

from faceteer_trainer.errors import JobError
from faceteer_trainer.files import locked, writing
from faceteer_trainer.labels.run import WORK, edit_library, score_icons, space_of
from faceteer_trainer.labels.scores import IconJudge
from faceteer_trainer.library.templates import OTHER_TEMPLATE, scaled, template_of
from faceteer_trainer.progress import Progress

_SAVE_SECONDS = 60.0
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


def edited(
    sae: SparseAutoencoder,
    statistics: FeatureStatistics,
    template: Floats,
    feature: int,
    strengths: Sequence[float],
) -> Floats:
    """The template with the feature switched on at each strength, float32 [s, d].

    ``x + (v - f(x)) d`` less ``f_r(x) d_r`` of each rival r, as the SAE service's SWITCH.
    """
    (active,) = sae.encode(template[None])
    rivals = statistics.rivals(feature)
    off = template - active.at(rivals) @ sae.directions(rivals) if len(rivals) else template
    index = np.array([feature])
    values = np.asarray(strengths, np.float32) * statistics.p99[feature]
    return np.asarray(off + (values - active.at(index)[0])[:, None] * sae.directions(index)[0], np.float32)


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
    statistics: FeatureStatistics,
    features: Sequence[tuple[int, Floats]],
    settings: IconSettings,
) -> Iterator[tuple[int, bytes]]:
    """(feature, WebP strip) for each (feature, template), a batch at a time.

    Raises:
        JobError: a picture cannot be drawn.
    """
    plain: dict[bytes, npt.NDArray[np.uint8]] = {}
    each = max(1, settings.batch // len(settings.strengths))
    for start in range(0, len(features), each):
        group = features[start : start + each]
        for _, template in group:
            if template.tobytes() not in plain:
                (plain[template.tobytes()],) = _draw(denoiser, [template], settings)
        embeds = [row for feature, x in group for row in edited(sae, statistics, x, feature, settings.strengths)]
        pictures = _draw(denoiser, embeds, settings)
        for place, (feature, template) in enumerate(group):
            own = pictures[place * len(settings.strengths) : (place + 1) * len(settings.strengths)]
            yield feature, icon_strip([Image.fromarray(pixels) for pixels in (plain[template.tobytes()], *own)])


def _draw(denoiser: Denoiser, embeds: Sequence[Floats], settings: IconSettings) -> list[npt.NDArray[np.uint8]]:
    width, height = settings.size
    pictures = [
        denoiser.begin(
            ImageSpec(row, None, width, height, settings.steps, settings.guidance, settings.scheduler, settings.seed)
        )
        for row in embeds
    ]
    while any(not picture.done for picture in pictures):
        denoiser.step(pictures)
        for picture in pictures:
            if picture.error is not None:
                raise JobError(f"an icon cannot be drawn: {picture.error}")
    return denoiser.decode([picture.latents for picture in pictures])


def draw_library_icons(
    bundle_directory: Path,
    features: str = "alive",
    *,
    strengths: Sequence[float] = STRENGTHS,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = SEED,
    batch: int = 24,
    device: str = "cpu",
    judge: IconJudge | None = None,
) -> tuple[int, int]:
    """Gives features of the bundle's library their icons, and every label its causal score.

    Resumes after a kill: what was drawn is saved every minute, and an icon whose content address is the same is kept.

    Args:
        bundle_directory: whose library it is.
        features: "alive", "labelled", or numbers with commas between them.
        strengths: SCALED, left to right.
        steps, guidance: of each picture; None for what icons are drawn with anywhere.
        seed: of every picture's noise.
        batch: pictures drawn together.
        device: where the models run.
        judge: of the labels it knows; all others are judged by the bundle's own text tower.

    Returns:
        How many were drawn, and how many were there already.

    Raises:
        BundleError: the bundle lacks a part.
        JobError: an icon cannot be drawn.
    """
    bundle = Bundle.open(bundle_directory)
    sae = SparseAutoencoder.load(bundle.part("sae").path)
    statistics = load_statistics(bundle.part("sae").path, sae.d_in, sae.d_sae)
    if statistics is None:
        raise JobError("the bundle's SAE has no statistics to scale strengths by; make them with build-library")
    part = bundle.part("generator")
    kind = str(part.facts.get("kind", KandinskyDecoder.kind))
    denoiser = Denoiser(load_decoder(part.path, kind=kind, device=device))
    encoder, preprocessor = load_encoder(bundle.part("encoder").path, device=device)
    usual_steps, usual_guidance = icon_drawing(int(part.facts["steps"]), float(part.facts["guidance_scale"]))
    settings = IconSettings(
        tuple(strengths),
        steps or usual_steps,
        usual_guidance if guidance is None else guidance,
        tuple(part.facts["sizes"][0]),
        str(part.facts["scheduler"]),
        seed,
        batch,
    )
    with locked(bundle_directory / WORK), Progress() as report, writing(bundle_directory):
        with edit_library(bundle_directory) as editor:
            if TEMPLATE not in editor.facts:
                raise JobError("the library names no template for icons; rebuild it with build-library")
            described = list(editor.features())
            wanted = _wanted(described, features)
            template = _templates(editor, sae, described)
            there = editor.icon_keys()
            revisions = part.revision, bundle.part("sae").revision
            keys = {f.index: address(settings, *revisions, template[f.index], f.index) for f in wanted}
            left = [(f.index, template[f.index]) for f in wanted if there.get(f.index) != keys[f.index]]
            saved = time.monotonic()
            for done, (feature, webp) in enumerate(draw_icons(denoiser, sae, statistics, left, settings)):
                editor.icon(feature, webp, settings.strengths, keys[feature])
                report("drawing icons", (done + 1) / len(left))
                if time.monotonic() - saved > _SAVE_SECONDS:
                    editor.save()
                    saved = time.monotonic()
            if encoder.has_text_tower:
                score_icons(editor, encoder, preprocessor, space_of(editor, encoder), report, judge)
        bundle_format.seal(bundle_directory)
    return len(left), len(wanted) - len(left)


def _templates(editor: LibraryEditor, sae: SparseAutoencoder, features: list[Described]) -> list[Floats]:
    """The template that each feature's icon starts from."""
    p99 = np.array([feature.p99 for feature in features], np.float32)
    templates = [unpack_template(editor.facts[name]) for name in (TEMPLATE, OTHER_TEMPLATE) if name in editor.facts]
    activations = [scaled(sae, template, p99) for template in templates]
    return [template_of(feature.index, templates, activations) for feature in features]


def _wanted(features: list[Described], chosen: str) -> list[Described]:
    """The features asked for; of dead ones there is nothing to draw, as they have no scale."""
    if chosen in ("alive", "labelled"):
        return [f for f in features if f.p99 > 0 and (chosen == "alive" or f.label)]
    try:
        numbers = {int(number) for number in chosen.split(",")}
    except ValueError:
        raise JobError(f"--features {chosen}: must be alive, labelled, or numbers like 1,2,3") from None
    unknown = numbers - {f.index for f in features if f.p99 > 0}
    if unknown:
        raise JobError(f"--features: {min(unknown)} is no feature that ever fires; the library has {len(features)}")
    return [f for f in features if f.index in numbers]
