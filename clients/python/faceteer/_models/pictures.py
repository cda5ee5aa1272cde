"""Pictures of any kind to the bytes that travel (files as they are: the server says what it reads), and back to PIL."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from faceteer._errors import InternalError, invalid

if TYPE_CHECKING:
    import numpy.typing as npt

#: What may be opened or encoded: a path, a whole file's bytes, a PIL image, or a uint8 array [height, width],
#: [height, width, 3] (RGB) or [height, width, 4] (RGBA).
Picture: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[np.uint8]"


def picture_bytes(picture: Picture) -> bytes:
    """The picture as a whole file: files and bytes unchanged, PIL images and arrays as PNG (lossless).

    Raises:
        OSError: the file cannot be read.
        InvalidArgumentError: the value is no picture; says what would be.
    """
    if isinstance(picture, str | os.PathLike):
        return Path(picture).read_bytes()
    if isinstance(picture, bytes | bytearray | memoryview):
        if not len(picture):
            raise invalid("picture", "no bytes at all; pass a whole PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF file")
        return bytes(picture)
    if isinstance(picture, np.ndarray):
        picture = _from_array(picture)
    if isinstance(picture, Image.Image):
        return _png(picture)
    raise invalid(
        "picture", f"{type(picture).__name__} is not a picture; pass a path, bytes, a PIL image or a uint8 array"
    )


def picture_name(picture: Picture) -> str:
    """What to call the picture in front of people: its file's name, or its kind."""
    if isinstance(picture, str | os.PathLike):
        return Path(picture).name
    filename = getattr(picture, "filename", "")
    return Path(filename).name if isinstance(filename, str) and filename else "picture"


def decode_picture(data: bytes, **info: Any) -> Image.Image:
    """A server's picture as a loaded PIL image; ``info`` is added to its ``.info``."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, ValueError) as error:
        raise InternalError(f"the server sent a picture that cannot be read: {error}") from error
    image.info.update(info)
    return image


def small(picture: Image.Image, side: int = 384) -> Image.Image:
    """A copy within ``side`` pixels, to be kept for a view without keeping the picture."""
    copy = picture.copy()
    copy.thumbnail((side, side))
    return copy


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8:
        fix = "multiply by 255 and use .astype(numpy.uint8)" if array.dtype.kind == "f" else "use .astype(numpy.uint8)"
        raise invalid("picture", f"an array of {array.dtype}; pass uint8, 0 to 255 ({fix})")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise invalid(
            "picture", f"an array of shape {list(array.shape)}; pass [height, width], or [height, width, 3 or 4]"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _png(image: Image.Image) -> bytes:
    if not (image.width and image.height):
        raise invalid("picture", "a picture without pixels")
    # An image opened from a file may be rotated by EXIF; PNG keeps the tag, and the server applies it.
    exif = image.getexif()
    if image.mode not in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.mode in ("PA", "RGBa", "La") else "RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, exif=exif.tobytes() if exif else b"")
    return buffer.getvalue()
