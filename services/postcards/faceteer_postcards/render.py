"""Draw a scene as a 64 x 64 picture: the same pixels for the same scene on every machine.

Backgrounds and sprites are drawn once and kept; a picture is a few small blends, so one core draws well over 500 a
second.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from faceteer_postcards.sprites import INK, RGB, Pixels, mix, sprite
from faceteer_postcards.world import Scene

SIZE = 64
HORIZON = 37
FRAME = 5  # the border's width in pixels
_SCALE = 4  # backgrounds are drawn this much larger and shrunk

# sky at the top, sky at the horizon, the light on the ground and on the subjects
_LIGHT: dict[str, tuple[RGB, RGB, tuple[float, float, float], tuple[float, float, float]]] = {
    "dawn": ((168, 170, 226), (255, 214, 206), (1.0, 0.86, 0.90), (1.0, 0.94, 0.95)),
    "day": ((70, 160, 240), (178, 224, 250), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    "dusk": ((96, 38, 120), (255, 128, 40), (0.82, 0.60, 0.56), (0.94, 0.86, 0.84)),
    "night": ((8, 10, 44), (28, 36, 88), (0.40, 0.42, 0.56), (0.74, 0.76, 0.84)),
}
_GROUND: dict[str, tuple[RGB, RGB]] = {
    "grass": ((112, 190, 70), (78, 152, 48)),
    "sand": ((238, 208, 140), (212, 172, 98)),
    "snow": ((246, 250, 255), (208, 222, 240)),
    "water": ((60, 132, 196), (130, 196, 232)),
}
# places of the subjects' feet (x, y) and their size, by count
_PLACES: dict[str, tuple[tuple[tuple[int, int], ...], int]] = {
    "one": (((32, 54),), 33),
    "two": (((19, 54), (45, 54)), 25),
    "three": (((15, 48), (49, 48), (32, 57)), 20),
}
_STARS = ((9, 9), (17, 16), (25, 8), (33, 17), (40, 10), (11, 25), (28, 27), (56, 26), (46, 22))


@lru_cache(maxsize=512)
def _background(time: str, ground: str, outlined: bool, variant: int) -> Pixels:
    """Sky, sun or moon, and ground [64, 64, 3] in 0..255. `variant` 0..3 moves the cloud and the ground's marks."""
    rng = np.random.default_rng(variant)
    k = _SCALE
    top, low, light, _ = _LIGHT[time]
    share = np.linspace(0, 1, HORIZON * k, dtype=np.float32)[:, None, None] ** 1.3
    pixels = np.zeros((SIZE * k, SIZE * k, 3), dtype=np.float32)
    pixels[: HORIZON * k] = np.asarray(top, np.float32) * (1 - share) + np.asarray(low, np.float32) * share
    image = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(image)

    def disc(x: float, y: float, radius: float, fill: RGB) -> None:
        corners = (x - radius) * k, (y - radius) * k, (x + radius) * k, (y + radius) * k
        draw.ellipse(corners, fill, INK if outlined else None, 5)

    if time == "night":
        for x, y in _STARS:
            draw.rectangle((x * k, y * k, (x + 1) * k, (y + 1) * k), fill=(236, 236, 210))
        disc(50, 14, 6.5, (248, 244, 208))
        sky_here = mix(top, low, 0.25)
        draw.ellipse((45 * k, 6 * k, 53.5 * k, 17 * k), fill=sky_here)
    elif time == "day":
        disc(51, 13, 6, (255, 236, 90))
    elif time == "dawn":
        disc(12, HORIZON - 3, 7, (255, 240, 170))
    else:
        disc(52, HORIZON - 1, 9, (255, 70, 30))
    if time != "night":
        cloud = {"dawn": (255, 238, 240), "day": (255, 255, 255), "dusk": (206, 96, 120)}[time]
        left, y = (10, 22, 14, 18)[variant] + 2, (13, 12, 15, 10)[variant]
        for dx, dy, radius in ((0, 1, 3.0), (5, -1, 4.0), (10, 1, 3.0)):
            draw.ellipse([(left + dx - radius) * k, (y + dy - radius) * k,
                          (left + dx + radius) * k, (y + dy + radius) * k], fill=cloud)  # fmt: skip
        draw.rectangle((left * k, (y + 1) * k, (left + 10) * k, (y + 4) * k - 1), fill=cloud)

    base, mark = (tuple(round(c * f) for c, f in zip(rgb, light, strict=True)) for rgb in _GROUND[ground])
    draw.rectangle((0, HORIZON * k, SIZE * k, SIZE * k), fill=base)
    if outlined:
        draw.rectangle((0, HORIZON * k - 3, SIZE * k, HORIZON * k + 3), fill=INK)
    offset = int(rng.integers(0, 8))
    for row, y in enumerate(range(HORIZON + 4, SIZE, 6)):
        for x in range(-8, SIZE + 8, 13):
            at, foot = (x + offset + 6 * (row % 2)) * k, y * k
            if ground == "water":
                draw.arc((at, foot - 2 * k, at + 8 * k, foot + 2 * k), 180, 360, fill=mark, width=k + 1)
            elif ground == "grass":
                draw.polygon([(at, foot + 2 * k), (at + k, foot - 2 * k), (at + 2 * k, foot + 2 * k)], fill=mark)
                draw.polygon([(at + 2 * k, foot + 2 * k), (at + 4 * k, foot - k), (at + 4 * k, foot + 2 * k)], mark)
            elif ground == "sand":
                draw.ellipse((at, foot, at + 2 * k, foot + 2 * k - 1), fill=mark)
                draw.ellipse((at + 5 * k, foot - 2 * k, at + 6 * k, foot - k), fill=mark)
            else:
                draw.ellipse((at, foot - k, at + 9 * k, foot + 2 * k), fill=mark)
    small = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)


def _paste(picture: Pixels, subject: tuple[Pixels, Pixels], left: int, top: int, light: Pixels) -> None:
    """Blend a sprite into the picture in place, clipped at its edges."""
    colour, alpha = subject
    size = colour.shape[0]
    y0, y1, x0, x1 = max(top, 0), min(top + size, SIZE), max(left, 0), min(left + size, SIZE)
    cut = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    region = picture[y0:y1, x0:x1]
    region *= 1 - alpha[cut]
    region += colour[cut] * light


@lru_cache(maxsize=1)
def _fog() -> Pixels:
    """How much of the picture the fog hides [64, 64, 1]: two drifting bands over an even haze."""
    y = np.arange(SIZE, dtype=np.float32)
    share = 0.30 + 0.26 * np.exp(-(((y - 33) / 6.0) ** 2)) + 0.14 * np.exp(-(((y - 14) / 4.0) ** 2))
    return np.repeat(share[:, None, None], SIZE, axis=1)


def _weather(picture: Pixels, scene: Scene, rng: np.random.Generator) -> None:
    """Rain, snowfall or fog over the picture, in place."""
    if scene.weather == "fog":
        haze = 150.0 if scene.time == "night" else 226.0
        picture += (haze - picture) * _fog()
    elif scene.weather == "rain":
        picture *= 0.84
        drop = np.asarray((190, 215, 255), np.float32)
        for column in range(0, SIZE, 8):
            for row in range(0, SIZE, 16):
                x = column + int(rng.integers(0, 3))
                y = row + 8 * ((column // 8) % 2) + int(rng.integers(0, 4))
                for step in range(6):
                    xx, yy = x + (5 - step) // 2, y + step
                    if xx < SIZE and yy < SIZE:
                        picture[yy, xx] += (drop - picture[yy, xx]) * 0.85
    elif scene.weather == "snowfall":
        rim = np.asarray((120, 140, 180), np.float32)
        for column in range(0, SIZE, 12):
            for row in range(0, SIZE, 12):
                x = column + 2 + int(rng.integers(0, 4))
                y = row + 2 + 6 * ((column // 12) % 2) + int(rng.integers(0, 4))
                picture[y : y + 4, x : x + 4] += (rim - picture[y : y + 4, x : x + 4]) * 0.25
                picture[y : y + 3, x : x + 3] = 255.0


def render(scene: Scene) -> npt.NDArray[np.uint8]:
    """The picture of a scene: uint8 [64, 64, 3], RGB."""
    return render_with_mask(scene)[0]


def render_with_mask(scene: Scene) -> tuple[npt.NDArray[np.uint8], Pixels]:
    """The picture, and how much of each pixel is a subject: float32 [64, 64], 0 to 1; weather in front is left out."""
    rng = np.random.default_rng(scene.seed)
    outlined = scene.style == "outlined"
    picture = _background(scene.time, scene.ground, outlined, int(rng.integers(0, 4))).copy()
    light = np.asarray(_LIGHT[scene.time][3], np.float32)
    places, size = _PLACES[scene.count]
    size += int(rng.integers(-1, 2))
    dx, dy = (int(step) for step in rng.integers(-2, 3, 2))
    rise = 0 if scene.subject != "balloon" else 8 if scene.count == "one" else 14
    drawing = sprite(scene.subject, scene.colour, size, outlined, scene.time == "night")
    ground = np.ones((SIZE, SIZE, 1), np.float32)  # what of each pixel is not a subject
    cut_out = np.zeros_like(drawing[0][..., :1]), drawing[1]
    for x, foot in places:
        feet = foot + dy // 2 + (int(rng.integers(-1, 2)) if rise else 0)
        if not rise:
            shade = picture[feet - 1 : feet + 2, max(x + dx - size // 3, 0) : x + dx + size // 3]
            shade *= 0.72
        _paste(picture, drawing, x + dx - size // 2, feet - size + 2 - rise, light)
        _paste(ground, cut_out, x + dx - size // 2, feet - size + 2 - rise, light[:1])
    _weather(picture, scene, rng)
    mask = 1 - ground[..., 0]
    if scene.border != "none":
        mask[:FRAME] = mask[-FRAME:] = 0.0
        mask[:, :FRAME] = mask[:, -FRAME:] = 0.0
    return _finish(picture, scene), mask


def _finish(picture: Pixels, scene: Scene) -> npt.NDArray[np.uint8]:
    """Style, then border."""
    if scene.style == "pixelated":
        blocks = picture.reshape(SIZE // 2, 2, SIZE // 2, 2, 3).mean(axis=(1, 3))
        step = 255.0 / 6
        picture = (np.round(blocks / step) * step).repeat(2, axis=0).repeat(2, axis=1)
    elif scene.style == "striped":
        picture[3::4] *= 0.35
    if scene.border != "none":
        fill = 255.0 if scene.border == "white" else 0.0
        picture[:FRAME] = picture[-FRAME:] = fill
        picture[:, :FRAME] = picture[:, -FRAME:] = fill
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)
