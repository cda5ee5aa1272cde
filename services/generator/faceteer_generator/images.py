"""Image files to pixels of a given size, and pixels to files: PNG and WebP. Too slow for an event loop."""

from __future__ import annotations

import contextlib
import io
import struct

import numpy as np
from faceteer_runtime.errors import FaceteerError, ImageTooLarge, UnreadableImage
from PIL import Image, ImageOps, UnidentifiedImageError

from faceteer_generator.requests import Format

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def read_image(data: bytes, width: int, height: int, *, field: str, max_bytes: int, max_pixels: int) -> np.ndarray:
    """Decodes one image, upright, on white, scaled to cover ``width`` x ``height`` and cropped around its middle.

    An image that has this size already is returned as it is.

    Args:
        data: a whole PNG, JPEG, WebP, GIF (its first frame), BMP or TIFF file.
        width: pixels.
        height: pixels.
        field: the request's field, for errors.
        max_bytes: most bytes of the file.
        max_pixels: most pixels in it; nothing is decoded of an image with more.

    Returns:
        uint8 [height, width, 3], sRGB as stored.

    Raises:
        ImageTooLarge: more bytes or pixels than allowed.
        UnreadableImage: not a whole image of these formats.
    """
    if not data:
        raise UnreadableImage(field, "is empty")
    if len(data) > max_bytes:
        raise ImageTooLarge(field, f"{len(data)} bytes are more than the {max_bytes} that are taken")
    # Pillow's WebP reader asks for two canvases of memory when it opens a file, before it can be asked for the size.
    _check_pixels(_webp_canvas(data), max_pixels, field)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(image.size, max_pixels, field)
            upright = _upright_rgb(image)
            return np.array(ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS), dtype=np.uint8)
    except FaceteerError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLarge(field, f"more than {max_pixels} pixels; send a smaller one") from None
    except UnidentifiedImageError:
        raise UnreadableImage(field, f"is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from None
    except Exception as error:
        # Pillow's decoders raise nearly everything on damaged files: OSError, SyntaxError, struct.error, EOFError …
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UnreadableImage(field, f"is damaged or cut off ({reason})") from None


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


def _check_pixels(size: tuple[int, int] | None, limit: int, field: str) -> None:
    if size is not None and size[0] * size[1] > limit:
        raise ImageTooLarge(
            field, f"{size[0]} x {size[1]} pixels are more than the {limit} that are taken; send a smaller one"
        )


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Width and height of an extended WebP file by its header (RFC 9649); None for others, which are small to open."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _upright_rgb(image: Image.Image) -> Image.Image:
    """First frame, upright, on white, 8 bits a channel."""
    image.load()
    # Metadata that cannot be read says nothing about orientation; the image itself has been read.
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16 bits a channel: Pillow's own conversion clips instead of scaling.
        values = np.clip(np.asarray(image), 0, 0xFFFF) >> 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
