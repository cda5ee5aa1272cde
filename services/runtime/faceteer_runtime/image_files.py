"""Image files that callers send, to upright RGB: sizes are checked before anything is decoded."""

from __future__ import annotations

import contextlib
import importlib
import io
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from faceteer_runtime.errors import FaceteerError, ImageTooLarge, UnreadableImage


def _heif() -> tuple[str, ...]:
    """HEIF where pillow-heif is installed, an extra: it brings an HEVC decoder, whose licence and patents not everybody
    wants.
    """
    try:
        importlib.import_module("pillow_heif").register_heif_opener(thumbnails=False)
    except ImportError:
        return ()
    return ("HEIF",)


# Opening any of them reads the header and decodes nothing.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", *_heif())
# The brands by which a HEIC file names itself (ISO/IEC 23008-12, annex B; mif1 and msf1 may hold other codecs).
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


_NO_HEIC = (
    "is a HEIC file, as iPhones write them, which this server does not read: send it as JPEG, or have the server's "
    "operator install faceteer-runtime[heic]"
)


def read_image(
    data: bytes,
    fit: Callable[[Image.Image], Image.Image],
    *,
    field: str,
    max_bytes: int,
    max_pixels: int,
    draft: Callable[[Image.Image], Image.Image] = lambda image: image,
) -> np.ndarray:
    """Decodes one image and fits it to what a model takes. Slow enough to be kept off an event loop.

    Args:
        data: a whole PNG, JPEG, WebP, GIF (its first frame), BMP, TIFF or AVIF file, or HEIC with pillow-heif.
        fit: resizes and crops, RGB to RGB.
        field: the request's field, for errors.
        max_bytes: most bytes of the file.
        max_pixels: most pixels in it; nothing is decoded of an image with more.
        draft: may have the opened file decoded at a smaller size.

    Returns:
        uint8 [height, width, 3], sRGB as stored; EXIF orientation applied, transparency laid on white, 16 bits a
        channel cut to the upper 8, CMYK converted.

    Raises:
        ImageTooLarge: more bytes or pixels than allowed.
        UnreadableImage: not a whole image of these formats.
    """
    if not data:
        raise UnreadableImage(field, "is empty")
    if len(data) > max_bytes:
        raise ImageTooLarge(field, f"{len(data)} bytes are more than the {max_bytes} that are taken")
    try:
        _check_pixels(_webp_size(data), max_pixels, field)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(image.size, max_pixels, field)
            return np.array(fit(_upright_rgb(draft(image), field)), dtype=np.uint8)
    except FaceteerError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLarge(field, f"more than {max_pixels} pixels; send a smaller one") from None
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
            raise UnreadableImage(field, _NO_HEIC if "HEIF" not in FORMATS else "is a damaged HEIC file") from None
        raise UnreadableImage(field, f"is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from None
    except Exception as error:
        # Pillow's decoders raise nearly everything on damaged files: OSError, SyntaxError, struct.error, EOFError …
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UnreadableImage(field, f"is damaged or cut off ({reason})") from None


def _check_pixels(size: tuple[int, int] | None, limit: int, field: str) -> None:
    if size is not None and size[0] * size[1] > limit:
        raise ImageTooLarge(
            field, f"{size[0]} x {size[1]} pixels are more than the {limit} that are taken; send a smaller one"
        )


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height by a WebP file's header (RFC 9649); None for other files.

    Pillow's WebP reader asks for two canvases of memory when it opens a file, before it can be asked for the size.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _upright_rgb(image: Image.Image, field: str) -> Image.Image:
    """The image as a person sees it: first frame, upright, on white, 8 bits a channel."""
    image.load()
    # Unreadable metadata gives no orientation; the image itself has been read.
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16 bits a channel: Pillow's own conversion clips instead of scaling.
        return Image.fromarray((np.clip(np.asarray(image), 0, 0xFFFF) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnreadableImage(field, "holds floating-point numbers, whose range nobody can tell; send 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        on_white = Image.new("RGB", image.size, "white")
        on_white.paste(image, mask=image.getchannel("A"))
        return on_white
    return image if image.mode == "RGB" else image.convert("RGB")
