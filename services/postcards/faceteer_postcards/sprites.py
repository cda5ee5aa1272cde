"""The eight subjects, drawn large with Pillow and scaled down: an RGBA sprite for each kind, colour, size and look."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter

RGB = tuple[int, int, int]
Pixels = npt.NDArray[np.float32]

COLOURS: dict[str, RGB] = {
    "red": (216, 28, 36),
    "orange": (250, 130, 10),
    "yellow": (252, 222, 30),
    "green": (30, 160, 50),
    "blue": (35, 90, 230),
    "purple": (122, 40, 170),
    "pink": (255, 120, 190),
    "white": (250, 250, 250),
}
INK: RGB = (16, 14, 24)
CANVAS = 200  # a sprite is drawn on 200 x 200 and shrunk
MARGIN = 14  # room for its outline


def mix(colour: RGB, other: RGB, share: float) -> RGB:
    """`colour` with `share` of `other` in it."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue


def _house(draw: ImageDraw.ImageDraw, colour: RGB, dark: RGB, light: RGB, window: RGB) -> None:
    draw.rectangle((136, 28, 156, 80), fill=dark)
    draw.polygon([(14, 92), (100, 16), (186, 92)], fill=dark)
    draw.rectangle((32, 90, 168, 186), fill=colour)
    draw.rectangle((84, 126, 118, 186), fill=(92, 56, 36))
    draw.rectangle((46, 108, 74, 140), fill=window)
    draw.rectangle((128, 108, 156, 140), fill=window)


def _tree(draw: ImageDraw.ImageDraw, colour: RGB, dark: RGB, light: RGB, window: RGB) -> None:
    draw.rectangle((86, 120, 114, 186), fill=(112, 72, 42))
    draw.polygon([(26, 152), (100, 74), (174, 152)], fill=dark)
    draw.polygon([(36, 112), (100, 42), (164, 112)], fill=colour)
    draw.polygon([(52, 70), (100, 14), (148, 70)], fill=light)


def _boat(draw: ImageDraw.ImageDraw, colour: RGB, dark: RGB, light: RGB, window: RGB) -> None:
    draw.rectangle((93, 14, 101, 140), fill=(96, 64, 40))
    draw.polygon([(106, 20), (106, 126), (178, 126)], fill=light)
    draw.polygon([(88, 44), (88, 126), (34, 126)], fill=light)
    draw.polygon([(14, 136), (186, 136), (154, 186), (46, 186)], fill=colour)
    draw.polygon([(38, 172), (162, 172), (154, 186), (46, 186)], fill=dark)


def _cat(draw: ImageDraw.ImageDraw, colour: RGB, dark: RGB, light: RGB, window: RGB) -> None:
    draw.arc((116, 84, 188, 176), 250, 130, fill=dark, width=18)
    draw.ellipse((38, 92, 150, 190), fill=colour)
    draw.polygon([(36, 14), (40, 72), (84, 44)], fill=dark)
    draw.polygon([(146, 14), (142, 72), (98, 44)], fill=dark)
    draw.ellipse((30, 32, 152, 122), fill=colour)
    for x in (62, 106):
        draw.ellipse((x, 62, x + 16, 84), fill=INK)
    draw.polygon([(83, 90), (99, 90), (91, 100)], fill=(240, 110, 130))
    draw.ellipse((70, 128, 118, 186), fill=light)


def _car(draw: ImageDraw.ImageDraw, colour: RGB, dark: RGB, light: RGB, window: RGB) -> None:
    draw.polygon([(44, 104), (68, 56), (136, 56), (164, 104)], fill=dark)
    draw.polygon([(60, 102), (76, 68), (98, 68), (98, 102)], fill=window)
    draw.polygon([(106, 102), (106, 68), (130, 68), (148, 102)], fill=window)
    draw.rounded_rectangle((10, 100, 190, 158), radius=20, fill=colour)
    for x in (34, 122):
        draw.ellipse((x, 136, x + 46, 182), fill=(34, 34, 40))
        draw.ellipse((x + 14, 150, x + 32, 168), fill=(190, 190, 196))


def _balloon(draw: ImageDraw.ImageDraw, colour: RGB, dark: RGB, light: RGB, window: RGB) -> None:
    draw.line((66, 120, 84, 160), fill=(70, 50, 40), width=6)
    draw.line((134, 120, 116, 160), fill=(70, 50, 40), width=6)
    draw.ellipse((32, 12, 168, 142), fill=colour)
    draw.ellipse((74, 12, 126, 142), fill=light)
    draw.polygon([(60, 128), (140, 128), (118, 148), (82, 148)], fill=dark)
    draw.rectangle((80, 158, 120, 186), fill=(140, 92, 48))


def _flower(draw: ImageDraw.ImageDraw, colour: RGB, dark: RGB, light: RGB, window: RGB) -> None:
    draw.rectangle((95, 110, 106, 188), fill=(36, 120, 50))
    draw.ellipse((104, 144, 152, 170), fill=(36, 120, 50))
    draw.ellipse((50, 144, 97, 170), fill=(36, 120, 50))
    for petal in range(6):
        angle = math.tau * petal / 6 + math.pi / 6
        x, y = 100 + 42 * math.cos(angle), 72 + 42 * math.sin(angle)
        draw.ellipse((x - 29, y - 29, x + 29, y + 29), fill=colour if petal % 2 else mix(colour, dark, 0.35))
    draw.ellipse((78, 50, 122, 94), fill=(120, 70, 20))


def _ball(draw: ImageDraw.ImageDraw, colour: RGB, dark: RGB, light: RGB, window: RGB) -> None:
    draw.ellipse((28, 40, 174, 186), fill=colour)
    draw.chord((28, 40, 174, 186), 30, 150, fill=dark)
    draw.arc((28, 40, 174, 186), 0, 360, fill=dark, width=6)
    draw.ellipse((58, 62, 96, 96), fill=mix(colour, (255, 255, 255), 0.75))


_DRAW: dict[str, Callable[[ImageDraw.ImageDraw, RGB, RGB, RGB, RGB], None]] = {
    "house": _house, "tree": _tree, "boat": _boat, "cat": _cat,
    "car": _car, "balloon": _balloon, "flower": _flower, "ball": _ball,
}  # fmt: skip


@lru_cache(maxsize=4096)
def sprite(subject: str, colour: str, size: int, outlined: bool, lit: bool) -> tuple[Pixels, Pixels]:
    """One subject as (colour [size, size, 3] in 0..255 times alpha, alpha [size, size, 1] in 0..1).

    `lit` puts light into its windows (night). Every sprite has a thin darker rim, an outlined one a thick black one.
    """
    paint = COLOURS[colour]
    dark = mix(paint, (20, 10, 50), 0.22 if colour == "white" else 0.38)
    light = mix(paint, (255, 255, 255), 0.5)
    if colour == "white":
        light = (226, 228, 240)
    window = (255, 236, 140) if lit else (176, 220, 244)
    drawn = Image.new("RGBA", (CANVAS, CANVAS), (*paint, 0))
    _DRAW[subject](ImageDraw.Draw(drawn), paint, dark, light, window)
    canvas = Image.new("RGBA", (CANVAS + 2 * MARGIN, CANVAS + 2 * MARGIN), (0, 0, 0, 0))
    canvas.paste(drawn, (MARGIN, MARGIN))
    alpha = canvas.getchannel("A")
    # a blur and a threshold spread the shape by about the blur's radius, far faster than a rank filter
    spread = alpha.filter(ImageFilter.BoxBlur(13 if outlined else 4))
    rim = spread.point([255 if level > 8 else 0 for level in range(256)])
    under = Image.new("RGBA", canvas.size, (*(INK if outlined else mix(paint, INK, 0.55)), 0))
    under.putalpha(ImageChops.lighter(rim, alpha))
    canvas = Image.alpha_composite(under, canvas)
    premultiplied = np.asarray(canvas, dtype=np.float32).copy()
    premultiplied[..., :3] *= premultiplied[..., 3:] / 255.0
    channels = [
        np.asarray(Image.fromarray(premultiplied[..., c]).resize((size, size), Image.Resampling.BOX)) for c in range(4)
    ]
    pixels = np.stack(channels, axis=-1)
    return np.asarray(pixels[..., :3]), np.asarray(pixels[..., 3:] / 255.0)
