"""Results to stdout as JSON, and pictures to files."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from faceteer._files import write_atomically
from faceteer._models.values import shortest


def print_json(value: Any) -> None:
    """One JSON document on stdout; floats in the shortest form of their float32 value."""
    json.dump(_plain(value), sys.stdout, ensure_ascii=False, indent=None if not sys.stdout.isatty() else 2)
    sys.stdout.write("\n")


def write_picture(image: Image.Image, path: Path, format: str) -> None:
    """Writes the picture, all or nothing; a PNG carries its recipe in a text chunk."""
    buffer = io.BytesIO()
    if format == "PNG":
        chunks = PngInfo()
        if recipe := image.info.get("recipe"):
            chunks.add_itxt("faceteer:recipe", recipe)
        image.save(buffer, "PNG", pnginfo=chunks)
    elif format == "WEBP":
        image.save(buffer, "WEBP", lossless=True)
    else:
        image.convert("RGB").save(buffer, "JPEG", quality=95)
    write_atomically(path, buffer.getvalue())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return shortest(value)
    return value
