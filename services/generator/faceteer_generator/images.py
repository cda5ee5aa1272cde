"""Images to the size that is drawn, and pixels to files: PNG and WebP."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from faceteer_generator.requests import Format


def covering(image: Image.Image, *, width: int, height: int) -> Image.Image:
    """The image scaled to cover ``width`` x ``height`` and cropped around its middle; as it is if it has that size."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def encode_image(pixels: np.ndarray, format: Format, quality: int = 0) -> bytes:
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
