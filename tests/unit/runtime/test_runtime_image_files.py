"""Sizes are weighed before anything is decoded; the encoder's tests hold the pixels against open_clip."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from faceteer_runtime.errors import ImageTooLarge
from faceteer_runtime.image_files import read_image
from PIL import Image

# Differing in every byte of either, so that no two can be taken for each other.
WIDTH, HEIGHT = 0x2A31, 0x1B47


def webp(kind: bytes, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """A WebP file's header (RFC 9649) with no picture behind it."""
    body = {
        b"VP8 ": b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height),
        b"VP8L": b"\x2f" + struct.pack("<I", width - 1 | (height - 1) << 14),
        b"VP8X": b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
    }[kind]
    return b"RIFF" + struct.pack("<I", 100) + b"WEBP" + kind + struct.pack("<I", 20) + body + b"\0" * 16


def read(data: bytes, max_pixels: int) -> np.ndarray:
    return read_image(data, lambda image: image, field="image", max_bytes=10_000, max_pixels=max_pixels)


@pytest.mark.parametrize("kind", [b"VP8 ", b"VP8L", b"VP8X"], ids=["lossy", "lossless", "extended"])
def test_a_webp_file_is_refused_for_the_size_in_its_header_before_pillow_sees_it(
    kind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(Image, "open", lambda *args, **_: opened.append(args) or Image.new("RGB", (1, 1)))
    with pytest.raises(ImageTooLarge, match=f"{WIDTH} x {HEIGHT} pixels"):
        read(webp(kind), WIDTH * HEIGHT - 1)
    assert not opened
    read(webp(kind), WIDTH * HEIGHT)
    assert opened, "exactly as many as are taken"


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "GIF"])
def test_an_image_of_just_the_most_bytes_and_pixels_is_taken_and_one_more_is_not(format_: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, format_)
    data = buffer.getvalue()
    assert read(data, 600).shape == (20, 30, 3)
    with pytest.raises(ImageTooLarge, match="30 x 20 pixels are more than the 599"):
        read(data, 599)
    read_image(data, lambda image: image, field="image", max_bytes=len(data), max_pixels=600)
    with pytest.raises(ImageTooLarge, match=f"{len(data)} bytes are more than the {len(data) - 1}"):
        read_image(data, lambda image: image, field="image", max_bytes=len(data) - 1, max_pixels=600)
