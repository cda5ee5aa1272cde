"""Picture files to pixels: what open_clip itself would make of them, whatever the file, and nothing from bombs."""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import zlib
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
import torch
from faceteer_encoder.preprocess import Preprocessor
from faceteer_runtime.errors import FaceteerError, ImageTooLarge, UnreadableImage
from faceteer_runtime.image_files import FORMATS
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from tiny_bundle import picture

MAX_PIXELS = 4_000_000


def preprocessor(
    size: int | tuple[int, int] = 48, max_pixels: int = MAX_PIXELS, max_bytes: int = 2_000_000, **cfg: object
) -> Preprocessor:
    cfg = {"size": size, "mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic"} | cfg
    return Preprocessor(cfg, max_bytes=max_bytes, max_pixels=max_pixels)


PREPROCESSOR = preprocessor()


def saved(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0, channels: int = 3) -> Image.Image:
    """Smooth noise, so that a slip by a pixel shows."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 7, channels), np.uint8)
    return Image.fromarray(small.squeeze()).resize((width, height), Image.Resampling.BICUBIC)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width: int, height: int, rows: bytes = b"\0" * 100) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def same(data: bytes, image: Image.Image, tolerance: int = 0) -> bool:
    """Whether a file gives the pixels of an RGB picture."""
    expected = PREPROCESSOR.pixels(saved(image)).astype(int)
    return bool(np.abs(PREPROCESSOR.pixels(data).astype(int) - expected).max() <= tolerance)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [48, 47, (40, 56)], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (201, 77), (77, 201), (31, 30), (1, 1), (48, 47), (3, 90)], ids=str)
def test_pixels_are_open_clips_own(
    shape: tuple[int, int], size: int | tuple[int, int], interpolation: str, resize_mode: str
) -> None:
    if resize_mode == "longest" and shape == (1, 1) and isinstance(size, tuple):
        pytest.skip("open_clip itself cannot")
    ours = preprocessor(size, interpolation=interpolation, resize_mode=resize_mode)
    cfg = PreprocessCfg(
        size, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD, interpolation=interpolation, resize_mode=resize_mode
    )
    image = noise(*shape)
    expected = image_transform_v2(cfg, is_train=False)(image)
    made = ours.normalised([ours.pixels(saved(image))] * 2)
    assert torch.equal(made[0], expected)
    assert torch.equal(made[1], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_turned_camera_is_turned_back(orientation: int, format_: str) -> None:
    upright = noise(90, 61)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Pillow's own reading is the yardstick for 1; for the others, the picture as a camera held so would store it.
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    data = saved(stored, format_, exif=exif, **({"quality": 95} if format_ in ("JPEG", "WEBP") else {}))
    with Image.open(io.BytesIO(data)) as opened:
        as_viewers_show_it = ImageOps.exif_transpose(opened)
    assert as_viewers_show_it.size == upright.size
    assert same(data, upright, 0 if format_ in ("PNG", "TIFF") else 24)


def test_formats_and_modes_become_the_same_rgb() -> None:
    plain = picture(3, 80)
    for format_ in FORMATS:
        lossless = {"WEBP": {"lossless": True}}.get(format_, {})
        if format_ in ("AVIF", "HEIF"):
            # Smooth, because both halve the colours' resolution.
            smooth = plain.resize((4, 4)).resize((80, 80))
            assert same(saved(smooth, format_, quality=95), smooth, 12), format_
        elif format_ != "JPEG":
            flat = plain.quantize(200).convert("RGB") if format_ == "GIF" else plain
            assert same(saved(flat, format_, **lossless), flat), format_
    assert same(saved(plain, "JPEG", quality=98, subsampling=0), plain, 6)
    assert same(saved(plain.convert("CMYK"), "TIFF"), plain.convert("CMYK").convert("RGB"))
    assert same(
        saved(plain.convert("CMYK"), "JPEG", quality=98, subsampling=0), plain.convert("CMYK").convert("RGB"), 9
    )
    grey = plain.convert("L")
    assert same(saved(grey), grey.convert("RGB"))
    assert same(saved(plain.convert("1")), plain.convert("1").convert("RGB"))
    assert same(saved(plain.quantize(64)), plain.quantize(64).convert("RGB"))


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    grey = noise(70, 70, channels=1)
    wide = (np.asarray(grey, np.uint16) << 8) + 128
    for format_ in ("PNG", "TIFF"):
        assert same(saved(Image.fromarray(wide), format_), grey.convert("RGB"))


def test_floating_point_pictures_are_refused() -> None:
    with pytest.raises(UnreadableImage, match="floating-point"):
        PREPROCESSOR.pixels(saved(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"))


def test_transparency_is_laid_on_white() -> None:
    white, half = Image.new("RGB", (60, 60), "white"), Image.new("RGB", (60, 60), (255, 127, 127))
    assert same(saved(Image.new("RGBA", (60, 60), (255, 0, 0, 0))), white)
    assert same(saved(Image.new("RGBA", (60, 60), (255, 0, 0, 128))), half)
    assert same(saved(Image.new("LA", (60, 60), (0, 0))), white)
    assert same(saved(Image.new("RGBA", (60, 60), (255, 0, 0, 0)), "WEBP", lossless=True, exact=True), white)
    palette = Image.new("P", (60, 60), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert same(saved(palette, "PNG", transparency=1), white)
    assert same(saved(palette, "GIF", transparency=1), white)
    assert same(saved(Image.new("RGB", (60, 60), "blue"), "PNG", transparency=(0, 0, 255)), white)


@pytest.mark.parametrize("format_", ["PNG", "GIF", "WEBP", "TIFF"])
def test_of_a_moving_picture_the_first_frame_is_taken(format_: str) -> None:
    first, second = Image.new("RGB", (50, 50), "red"), Image.new("RGB", (50, 50), "lime")
    options = {"lossless": True} if format_ == "WEBP" else {}
    assert same(saved(first, format_, save_all=True, append_images=[second], **options), first, 1)


def test_one_pixel_is_a_picture() -> None:
    pixels = PREPROCESSOR.pixels(saved(Image.new("RGB", (1, 1), (9, 90, 200))))
    assert pixels.shape == (48, 48, 3)
    assert (pixels == (9, 90, 200)).all()


@pytest.mark.parametrize("format_", ["AVIF", "HEIF"])
def test_phones_pictures_are_read_within_the_same_bounds(format_: str) -> None:
    if format_ == "HEIF":
        pytest.importorskip("pillow_heif")
    big, decoded = saved(noise(300, 300), format_), []
    small = Preprocessor({"size": 48}, max_bytes=1_000_000, max_pixels=300 * 300 - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "load", lambda image: decoded.append(image))
        with pytest.raises(ImageTooLarge, match="300 x 300 pixels"):
            small.pixels(big)
    assert not decoded
    with pytest.raises(ImageTooLarge, match="bytes"):
        Preprocessor({"size": 48}, max_bytes=len(big) - 1, max_pixels=10**6).pixels(big)
    with pytest.raises(UnreadableImage):
        PREPROCESSOR.pixels(cut(big, 0.5))


def test_without_its_decoder_a_heic_file_is_refused_by_what_it_is_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("faceteer_runtime.image_files.FORMATS", ("PNG", "JPEG"))
    with pytest.raises(UnreadableImage, match=r"is a HEIC file, as iPhones write them.* send it as JPEG"):
        PREPROCESSOR.pixels(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(100))


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


BIG = noise(300, 300)
UNREADABLE = {
    "empty": b"",
    "text": b"hello, I am not a picture",
    "zeros": b"\0" * 1000,
    "pdf": b"%PDF-1.4 nothing",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "signature only": b"\x89PNG\r\n\x1a\n",
    "half a png": cut(saved(BIG), 0.5),
    "png without its end": saved(BIG)[:-200],
    "half a jpeg": cut(saved(BIG, "JPEG"), 0.5),
    "jpeg header": saved(BIG, "JPEG")[:600],
    "half a webp": cut(saved(BIG, "WEBP", lossless=True), 0.5),
    "half a gif": cut(saved(BIG, "GIF"), 0.5),
    "half a bmp": cut(saved(BIG, "BMP"), 0.5),
    "half a tiff": cut(saved(BIG, "TIFF"), 0.5),
    "a format not asked for": saved(BIG, "PPM"),
    "an icon": saved(BIG.resize((32, 32)), "ICO"),
    "short webp": b"RIFF\x10\0\0\0WEBPVP8 ",
    "no pixels": png_of_size(0, 10),
    "bad checksum": saved(BIG)[:-30] + b"12345678" + saved(BIG)[-22:],
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_whole_picture_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(UnreadableImage) as refused:
        PREPROCESSOR.pixels(UNREADABLE[name])
    assert refused.value.status == "INVALID_ARGUMENT"
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 250


def test_damage_anywhere_gives_a_picture_or_a_clear_error() -> None:
    rng = np.random.default_rng(1)
    for format_ in FORMATS:
        good = saved(noise(60, 60), format_)
        for _ in range(40):
            data = bytearray(good)
            for at in rng.integers(0, len(data), 3):
                data[at] = rng.integers(0, 256)
            with contextlib.suppress(UnreadableImage, ImageTooLarge):
                assert PREPROCESSOR.pixels(bytes(data)).shape == (48, 48, 3)


class Peak:
    """The most memory this process holds while the block runs, above what it held before, in bytes."""

    def __enter__(self) -> Peak:
        self._process, self._stop = psutil.Process(), threading.Event()
        self._before = self.bytes = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.bytes = max(self.bytes, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes -= self._before


def webp_of_size(width: int, height: int) -> dict[str, bytes]:
    """WebP headers of the three kinds that promise width x height pixels."""

    def riff(body: bytes) -> bytes:
        return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body + b"\0" * 64

    lossless = (width - 1) | (height - 1) << 14
    return {
        "webp": riff(b"VP8 " + struct.pack("<I", 20) + b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height)),
        "lossless webp": riff(b"VP8L" + struct.pack("<I", 20) + b"\x2f" + struct.pack("<I", lossless) + b"\0" * 9),
        "extended webp": riff(
            b"VP8X"
            + struct.pack("<I", 10)
            + b"\0\0\0\0"
            + (width - 1).to_bytes(3, "little")
            + (height - 1).to_bytes(3, "little")
        ),
    }


def bombs() -> Iterator[tuple[str, bytes]]:
    yield "png header", png_of_size(100_000, 100_000)
    # 12 KB that would really unfold to 300 MB.
    yield "real png", png_of_size(10_000, 10_000, b"\0" * (10_000 * 30_001))
    yield "between pillow's limits", png_of_size(10_000, 10_000)
    yield "gif", b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0" * 50
    yield "bmp", b"BM" + b"\0" * 12 + struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    yield from webp_of_size(16_000, 16_000).items()


@pytest.mark.parametrize(("name", "data"), [pytest.param(*bomb, id=bomb[0]) for bomb in bombs()])
def test_a_bomb_is_refused_by_its_header_in_constant_memory(name: str, data: bytes) -> None:
    with Peak() as peak, pytest.raises(FaceteerError) as refused:
        PREPROCESSOR.pixels(data)
    if name != "gif":
        assert isinstance(refused.value, ImageTooLarge)
        assert "pixels" in refused.value.message
    assert peak.bytes < 16 << 20


def test_a_file_of_too_many_bytes_is_not_even_looked_at() -> None:
    with pytest.raises(ImageTooLarge, match="bytes"):
        PREPROCESSOR.pixels(b"x" * 2_000_001)


@pytest.mark.parametrize("shape", [(1, 4_000_000), (4_000_000, 1), (2, 1_999_999)], ids=str)
def test_a_long_strip_is_not_blown_up(shape: tuple[int, int]) -> None:
    data = saved(Image.new("RGB", shape, "teal"))
    with Peak() as peak:
        assert PREPROCESSOR.pixels(data).shape == (48, 48, 3)
    # Resized whole, 48 pixels wide, it would take 37 GB.
    assert peak.bytes < 200 << 20


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_very_large_jpeg_is_decoded_smaller_to_nearly_the_same_pixels(orientation: int) -> None:
    large = noise(5203, 3901)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(large, "JPEG", quality=90, exif=exif)
    ours = preprocessor(max_pixels=30_000_000, max_bytes=80_000_000)
    with Peak() as peak:
        made = ours.pixels(data)
    assert peak.bytes < 40 << 20
    upright = large if orientation == 1 else large.transpose(Image.Transpose.ROTATE_270)
    exact = ours.pixels(saved(upright, compress_level=1))
    assert np.abs(made.astype(int) - exact.astype(int)).max() <= 4
