"""Results to stdout as JSON, and pictures to files."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from faceteer._files import write_atomically
from faceteer._models.picture_recipe import save_options
from faceteer._models.values import shortest


def print_json(value: Any) -> None:
    """One JSON document on stdout; floats in the shortest form of their float32 value."""
    json.dump(_plain(value), sys.stdout, ensure_ascii=False, indent=None if not sys.stdout.isatty() else 2)
    sys.stdout.write("\n")


_OPTIONS: dict[str, dict[str, Any]] = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 95}}


def write_picture(image: Image.Image, path: Path, format: str) -> None:
    """Writes the picture, with its recipe in it where it has one, all or nothing."""
    buffer = io.BytesIO()
    recipe = image.info.get("recipe")
    options = _OPTIONS[format] | (save_options(recipe, format) if recipe else {})
    (image.convert("RGB") if format == "JPEG" else image).save(buffer, format, **options)
    write_atomically(path, buffer.getvalue())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return shortest(value)
    return value
