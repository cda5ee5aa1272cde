"""Pixels to files: PNG and WebP.

Knows nothing of where the pixels come from. Slow enough to be kept off an event loop.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from faceteer_generator.requests import Format


def encode_picture(pixels: np.ndarray, format: Format, quality: int = 0) -> bytes:
    """A whole file.

    Args:
        pixels: uint8 [height, width, 3].
        format: "png" or "webp".
        quality: of WebP, 1 to 99; 0 and 100 are lossless.
    """
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if format == "png":
        image.save(buffer, "PNG")
    elif quality in (0, 100):
        image.save(buffer, "WEBP", lossless=True)
    else:
        image.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()
