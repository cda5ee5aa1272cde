"""Icons: the strip, and a name that says all it depends on."""

from __future__ import annotations

import io

import numpy as np
import pytest
from faceteer_runtime.icons import (
    STRENGTHS,
    icon_drawing,
    icon_key,
    icon_pictures,
    icon_strip,
    pack_template,
    template_id,
    unpack_template,
)
from PIL import Image

TEMPLATE = np.linspace(-2, 2, 8, dtype=np.float32)
KEY = {"steps": 12, "guidance": 4.0, "size": (64, 64), "seed": 1}


def test_every_thing_an_icon_depends_on_changes_its_key() -> None:
    base = icon_key("g", "s", TEMPLATE, 7, **KEY)
    others = [
        icon_key("G", "s", TEMPLATE, 7, **KEY),
        icon_key("g", "S", TEMPLATE, 7, **KEY),
        icon_key("g", "s", TEMPLATE + 1, 7, **KEY),
        icon_key("g", "s", TEMPLATE, 8, **KEY),
        icon_key("g", "s", TEMPLATE, 7, **KEY, strengths=(0.5, 1.0)),
        *(
            icon_key("g", "s", TEMPLATE, 7, **(KEY | change))
            for change in ({"steps": 13}, {"guidance": 4.5}, {"size": (64, 32)}, {"seed": 2})
        ),
    ]
    assert len({base, *others}) == 1 + len(others)
    assert base == icon_key("g", "s", TEMPLATE.copy(), 7, **KEY, strengths=STRENGTHS)


def test_a_strip_shows_the_pictures_from_left_to_right() -> None:
    colours = ["red", "lime", "blue"]
    strip = Image.open(io.BytesIO(icon_strip([Image.new("RGB", (40, 40), colour) for colour in colours])))
    assert (strip.format, strip.size) == ("WEBP", (40 * 3 + 2 * 2, 40))
    for at, colour in enumerate(colours):
        pixel = np.array(strip.convert("RGB").getpixel((20 + 42 * at, 20)))
        assert np.abs(pixel - np.array(Image.new("RGB", (1, 1), colour).getpixel((0, 0)))).max() < 12


def test_a_strips_pictures_are_found_again() -> None:
    colours = ["red", "lime", "blue", "white"]
    found = icon_pictures(icon_strip([Image.new("RGB", (30, 40), colour) for colour in colours]), 4)
    for colour, picture in zip(colours, found, strict=True):
        assert picture.size == (30, 40)
        expected = np.array(Image.new("RGB", (1, 1), colour).getpixel((0, 0)))
        assert np.abs(np.array(picture)[4:-4, 4:-4].astype(int) - expected).max() < 12


def test_large_pictures_are_scaled_down_and_wide_ones_stay_wide() -> None:
    strip = Image.open(io.BytesIO(icon_strip([Image.new("RGB", (1024, 512), "red")])))
    assert strip.size == (512, 256)


def test_a_template_travels_as_text() -> None:
    assert np.allclose(unpack_template(pack_template(TEMPLATE)), TEMPLATE, atol=1e-3)
    assert len(pack_template(np.zeros(1280))) < 3500
    for broken in ("", "not base64!", pack_template(np.full(4, np.nan))):
        with pytest.raises(ValueError):  # noqa: PT011 (base64's own message is as good as ours)
            unpack_template(broken)


@pytest.mark.parametrize(
    ("default", "drawn"), [((50, 7.0), (12, 4.0)), ((8, 4.5), (8, 4.0)), ((12, 4.0), (12, 4.0)), ((13, 2.0), (12, 2.0))]
)
def test_an_icon_takes_twelve_steps_and_guidance_four_unless_the_bundle_takes_less(
    default: tuple[int, float], drawn: tuple[int, float]
) -> None:
    assert icon_drawing(*default) == drawn


def test_a_template_without_values_or_with_infinite_ones_is_refused() -> None:
    for packed in ("", pack_template(np.array([1.0, np.inf]))):
        with pytest.raises(ValueError, match="no finite values"):
            unpack_template(packed)


def test_a_templates_name_is_twelve_digits_of_its_values() -> None:
    name = template_id(np.float32([1, 2]))
    assert len(name) == 12
    assert name == template_id(np.array([1.0, 2.0])) != template_id(np.float32([1, 3]))
