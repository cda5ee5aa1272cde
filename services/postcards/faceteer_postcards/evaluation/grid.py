"""The picture grid of the report: renders, what the decoder makes of them, edits, and a control."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from faceteer_postcards.bundle import LoadedBundle
from faceteer_postcards.evaluation.editing import Edit, apply_edits
from faceteer_postcards.evaluation.painter import Painter
from faceteer_postcards.evaluation.steering import Steering
from faceteer_postcards.world import FACTOR_NAMES, FACTORS

SHOWN = ("time=night", "weather=snowfall", "colour=red", "count=three", "subject=boat", "ground=water",
         "style=outlined", "border=white")  # fmt: skip
_ZOOM, _GAP, _HEAD = 2, 6, 16


def sheet(columns: list[tuple[str, npt.NDArray[np.uint8]]], zoom: int = _ZOOM) -> Image.Image:
    """Columns of pictures [n, 64, 64, 3] under their headings, each pixel drawn `zoom` wide."""
    count, size = len(columns[0][1]), columns[0][1].shape[1] * zoom
    width, height = len(columns) * (size + _GAP) + _GAP, _HEAD + count * (size + _GAP) + _GAP
    image = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for column, (heading, pictures) in enumerate(columns):
        left = _GAP + column * (size + _GAP)
        draw.text((left + 2, 3), heading, fill=(40, 40, 40))
        for row, picture in enumerate(pictures):
            large = Image.fromarray(picture).resize((size, size), Image.Resampling.NEAREST)
            image.paste(large, (left, _HEAD + row * (size + _GAP)))
    return image


def draw_grid(bundle: LoadedBundle, steering: Steering, painter: Painter, path: Path, rows: int = 6) -> None:
    """Six held-out pictures down; across: the render, unedited, one switch a column, and a random feature."""
    features = {value.name: value.feature for value in steering.best}
    plain = (steering.pool.codes[:, FACTOR_NAMES.index("weather")] != FACTORS["weather"].index("fog")) & (
        steering.pool.codes[:, FACTOR_NAMES.index("style")] == 0
    )
    chosen = np.flatnonzero(plain)[:rows]
    if len(chosen) < rows:
        chosen = np.arange(min(rows, len(plain)))
    embeds, seeds = steering.pool.embeds[chosen], [steering.seeds[row] for row in chosen]
    columns = [("drawn", steering.pool.pictures[chosen]), ("before", steering.before_pictures[chosen])]
    for name in SHOWN:
        edited = apply_edits(bundle.sae, bundle.statistics, embeds, [Edit(features[name], 1.0, switch=True)])
        columns.append((name.replace("=", ": "), painter(edited, seeds)))
    night = apply_edits(bundle.sae, bundle.statistics, embeds, [Edit(features["time=night"], 1.0, switch=True)])
    length = (night - embeds).norm(dim=-1, keepdim=True)
    picked = torch.tensor(np.random.default_rng(1).choice(steering.common, len(chosen)))
    columns.append(("random feature", painter(embeds + length * bundle.sae.W_dec[picked].detach(), seeds)))
    sheet(columns).save(path, optimize=True)
