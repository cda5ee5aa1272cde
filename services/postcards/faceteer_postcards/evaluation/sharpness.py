"""How sharp subjects are: by pixels over the subject's box, which the judge of factors cannot tell.

The judge names a melted cat as well as a crisp one. A round trip is held against its own render; a drawing against the
nearest of many renders of its scene, for places and size are not in the embedding.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from faceteer_postcards.bundle import LoadedBundle, load_bundle
from faceteer_postcards.clip import embed_pictures
from faceteer_postcards.evaluation.painter import paint
from faceteer_postcards.movq import to_pictures, to_tensor
from faceteer_postcards.render import render_with_mask
from faceteer_postcards.unet import split_seeds
from faceteer_postcards.world import Scene, sample_codes

Pictures = npt.NDArray[np.uint8]
# Scenes that no model was trained on: codes by the first, everything else by the second and what follows it.
_CODES, _SCENES = 424_242, 3_000_000_000


def subject_box(mask: npt.NDArray[np.float32]) -> tuple[slice, slice]:
    """The box of a mask [h, w] above 0.5, grown by a pixel; the whole picture where there is no subject."""
    shown = mask > 0.5
    if not shown.any():
        return slice(None), slice(None)
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    return slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(columns[0] - 1, 0), columns[-1] + 2)


def decibels(one: Pictures, other: Pictures) -> float:
    """Peak signal to noise ratio of two uint8 pictures, at most 90."""
    error = np.square((one.astype(np.float64) - other) / 255).mean()
    return float(-10 * np.log10(max(error, 1e-9)))


@torch.no_grad()
def measure_sharpness(bundle: LoadedBundle, scenes: int = 48, renders: int = 48) -> dict[str, float]:
    """Means over scenes, in dB: of the autoencoder's round trip, and of drawings with the bundle's own steps."""
    codes = sample_codes(scenes, _CODES)
    drawn = [
        [render_with_mask(Scene.from_codes(row, _SCENES + 1000 * i + j)) for j in range(renders + 1)]
        for i, row in enumerate(codes)
    ]
    own = np.stack([several[0][0] for several in drawn])
    back = [
        bundle.movq.decode(bundle.movq.encode(part).latents, force_not_quantize=True).sample
        for part in to_tensor(own).split(16)
    ]
    round_trip = to_pictures(torch.cat(back))
    embeds, seeds = embed_pictures(bundle.encoder, own), split_seeds(11, scenes)
    parts = [slice(start, start + 16) for start in range(0, scenes, 16)]
    painted = np.concatenate([paint(bundle, embeds[part], seeds[part], bundle.steps) for part in parts])
    boxes = [[subject_box(mask) for _, mask in several] for several in drawn]
    nearest = [
        max(
            decibels(painted[i][box], picture[box]) for (picture, _), box in zip(several[1:], boxes[i][1:], strict=True)
        )
        for i, several in enumerate(drawn)
    ]
    return {
        "round_trip_subject": float(
            np.mean([decibels(round_trip[i][b[0]], own[i][b[0]]) for i, b in enumerate(boxes)])
        ),
        "round_trip": float(np.mean([decibels(*pair) for pair in zip(round_trip, own, strict=True)])),
        "drawn_subject": float(np.mean(nearest)),
        "drawn_subject_worst_tenth": float(np.quantile(nearest, 0.1)),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's options."""
    parser.add_argument("--bundle", type=Path, action="append", required=True, help="may be given several times")
    parser.add_argument("--scenes", type=int, default=48)
    parser.add_argument("--renders", type=int, default=48, help="of each scene, of which a drawing's nearest counts")


def run(arguments: argparse.Namespace) -> None:
    """Measure each bundle and print its figures, one a line."""
    torch.set_num_threads(1)
    for directory in arguments.bundle:
        figures = measure_sharpness(load_bundle(directory), arguments.scenes, arguments.renders)
        print(directory, json.dumps({name: round(value, 2) for name, value in figures.items()}), flush=True)
