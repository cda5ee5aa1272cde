"""`faceteer_trainer draw-icons --bundle B`: an icon for each feature, and the causal score of every label.

Knows the options and the order of things; what an icon is stands in `faceteer_runtime.icons` and in `drawing`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from faceteer_encoder.model import load_encoder
from faceteer_generator.denoise import Denoiser
from faceteer_generator.kandinsky import KandinskyDecoder
from faceteer_generator.model import load_decoder
from faceteer_library.editor import Described, LibraryEditor
from faceteer_runtime import bundle as bundle_format
from faceteer_runtime.bundle import Bundle, BundleError
from faceteer_runtime.icons import SEED, STRENGTHS, TEMPLATE, icon_drawing, unpack_template
from faceteer_sae.model import SparseAutoencoder
from rich.console import Console

from faceteer_trainer.errors import JobError
from faceteer_trainer.icons.drawing import Floats, IconSettings, address, draw_icons
from faceteer_trainer.icons.templates import OTHER_TEMPLATE, scaled, template_of
from faceteer_trainer.labels.command import score_icons, space_of
from faceteer_trainer.library.steps import Steps
from faceteer_trainer.locks import locked

_SAVE_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--features", default="alive", help="alive, labelled, or numbers: 1,2,3")
    parser.add_argument("--strengths", default=",".join(map(str, STRENGTHS)), help="SCALED, left to right")
    parser.add_argument("--steps", type=int, help="12 by default, or the bundle's own if fewer")
    parser.add_argument("--guidance", type=float, help="4 by default, or the bundle's own if less")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--batch", type=int, default=24, help="pictures drawn together")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of the arithmetic on a CPU")


def run(arguments: argparse.Namespace) -> None:
    """Draw, and say how many."""
    torch.set_num_threads(arguments.threads)
    began = time.monotonic()
    drawn, kept = draw_library_icons(arguments)
    print(f"{drawn:,} icons drawn in {time.monotonic() - began:.0f} s, {kept:,} were there already")


def draw_library_icons(arguments: argparse.Namespace) -> tuple[int, int]:
    """Gives features of the bundle's library their icons; returns how many were drawn and how many were there.

    Goes on after a kill: what was drawn is saved every minute, and an icon whose content address is the same is kept.

    Raises:
        JobError: the bundle lacks a part, or an icon cannot be drawn.
    """
    try:
        bundle = Bundle.open(arguments.bundle)
        sae = SparseAutoencoder.load(bundle.part("sae").path)
        part = bundle.part("generator")
        kind = str(part.facts.get("kind", KandinskyDecoder.kind))
        denoiser = Denoiser(load_decoder(part.path, kind=kind, device=arguments.device))
        encoder, preprocessor = load_encoder(bundle.part("encoder").path, device=arguments.device)
    except BundleError as error:
        raise JobError(str(error)) from None
    steps, guidance = icon_drawing(int(part.facts["steps"]), float(part.facts["guidance_scale"]))
    settings = IconSettings(
        _strengths(arguments.strengths),
        arguments.steps or steps,
        guidance if arguments.guidance is None else arguments.guidance,
        tuple(part.facts["sizes"][0]),
        str(part.facts["scheduler"]),
        arguments.seed,
        arguments.batch,
    )
    with locked(arguments.bundle / ".label-library"), Steps(Console(stderr=True)) as progress:
        try:
            with LibraryEditor(arguments.bundle / "library" / "library.sqlite") as editor:
                if TEMPLATE not in editor.facts:
                    raise JobError("the library names no template for icons; make it anew with build-library")
                features = list(editor.features())
                wanted = _wanted(features, arguments.features)
                template = _templates(editor, sae, features)
                there = editor.icon_keys()
                keys = {f.index: address(settings, part.revision, bundle.part("sae").revision, template[f.index],
                        f.index) for f in wanted}  # fmt: skip
                left = [(f.index, f.p99, template[f.index]) for f in wanted if there.get(f.index) != keys[f.index]]
                saved = time.monotonic()
                for done, (feature, webp) in enumerate(draw_icons(denoiser, sae, left, settings)):
                    editor.icon(feature, webp, settings.strengths, keys[feature])
                    progress("drawing icons", (done + 1) / len(left))
                    if time.monotonic() - saved > _SAVE_SECONDS:
                        editor.save()
                        saved = time.monotonic()
                if encoder.has_text_tower:
                    score_icons(editor, encoder, preprocessor, space_of(editor, encoder), progress)
        except ValueError as error:
            raise JobError(str(error)) from None
        except OSError as error:
            raise JobError(f"{arguments.bundle}: cannot be written ({error.strerror}); run again to go on") from None
        bundle_format.seal(arguments.bundle)
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


def _strengths(text: str) -> tuple[float, ...]:
    try:
        strengths = tuple(float(part) for part in text.split(","))
    except ValueError:
        strengths = ()
    if not 1 <= len(strengths) <= 8 or not all(-100 <= strength <= 100 for strength in strengths):
        raise JobError(f"--strengths {text}: must be one to eight numbers like 0.5,1,1.5")
    return strengths
