"""Pictures to try the product with: a few scenes that no model of the bundle was trained on, as they are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from PIL import Image

from faceteer_postcards.render import render
from faceteer_postcards.world import Scene

_SEED = 2_000_000_001  # beyond the seeds of every corpus

EXAMPLES: Final[dict[str, Scene]] = {
    "boat-day": Scene("day", "water", "boat", "red", "one", "clear", "none", "plain", _SEED),
    "house-dusk": Scene("dusk", "grass", "house", "yellow", "one", "clear", "white", "plain", _SEED + 1),
    "cats-meadow": Scene("day", "grass", "cat", "orange", "two", "clear", "none", "outlined", _SEED + 2),
    "balloons-dawn": Scene("dawn", "sand", "balloon", "purple", "three", "clear", "none", "plain", _SEED + 3),
    "trees-snow": Scene("day", "snow", "tree", "green", "three", "snowfall", "black", "plain", _SEED + 4),
    "car-night": Scene("night", "sand", "car", "blue", "one", "clear", "none", "outlined", _SEED + 5),
}


def write_examples(directory: Path) -> None:
    """Write each example as a 64 x 64 PNG."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, scene in EXAMPLES.items():
        Image.fromarray(render(scene)).save(directory / f"{name}.png", optimize=True)
