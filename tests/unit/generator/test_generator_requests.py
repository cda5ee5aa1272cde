"""Settings, limits, cache keys and the mailbox: what happens before and after the model."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faceteer_generator.events import Finished, Image, Mailbox, Preview, Progress, Queued, Started
from faceteer_generator.pictures import encode_picture
from faceteer_generator.requests import Limits, image_key
from faceteer_generator.settings import GeneratorSettings
from faceteer_runtime.bundle import BundleError, BundlePart
from faceteer_runtime.errors import InvalidField
from unit.generator.generator_drawings import drawing, embeds_of

FACTS = {"sizes": [[64, 64], [128, 64]], "steps": 25, "guidance_scale": 2.0, "scheduler": "ddim"}
LIMITS = Limits(((64, 64), (128, 64)), 25, 2.0, "ddim", 200, 4)


def part(**changes: Any) -> BundlePart:
    return BundlePart("generator", "r", Path("generator"), FACTS | changes)


def test_zeros_and_absent_values_mean_the_bundles_defaults() -> None:
    assert Limits.of_bundle(part(), max_steps=200, max_seeds=4) == LIMITS
    settled = LIMITS.settle()
    assert (settled.width, settled.height, settled.steps, settled.guidance_scale) == (64, 64, 25, 2.0)
    assert (settled.scheduler, settled.format, settled.quality, len(settled.seeds)) == ("ddim", "png", 0, 1)
    assert LIMITS.settle(guidance_scale=0.0).guidance_scale == 0.0
    assert LIMITS.settle(width=128).width == 128
    assert LIMITS.settle(seeds=[5, 5, 2]).seeds == (5, 5, 2)


@pytest.mark.parametrize(
    "changes",
    [{"sizes": []}, {"sizes": [[0, 64]]}, {"steps": 0}, {"guidance_scale": 31}, {"scheduler": "euler"}, {"sizes": 5}],
    ids=str,
)
def test_defaults_that_make_no_sense_are_refused_with_the_bundle(changes: dict[str, Any]) -> None:
    with pytest.raises(BundleError):
        Limits.of_bundle(part(**changes), max_steps=200, max_seeds=4)


def test_the_limit_of_lcm_is_its_own() -> None:
    assert LIMITS.settle(scheduler="lcm", steps=50).steps == 50
    with pytest.raises(InvalidField, match="1 to 50"):
        LIMITS.settle(scheduler="lcm", steps=51)


def test_everything_that_changes_a_file_changes_its_key() -> None:
    base = drawing(1)
    changes: list[dict[str, Any]] = [
        {"embeds": embeds_of(2)},
        {"negative": embeds_of(2)},
        {"width": 128},
        {"height": 128},
        {"steps": 5},
        {"guidance_scale": 2.5},
        {"scheduler": "lcm"},
        {"seed": 2},
    ]
    keys = [image_key("r", "cpu/float32", dataclasses.replace(base, **change), "png", 0) for change in [{}, *changes]]
    keys += [
        image_key("other", "cpu/float32", base, "png", 0),
        image_key("r", "cuda/float16", base, "png", 0),
        image_key("r", "cpu/float32", base, "webp", 0),
        image_key("r", "cpu/float32", base, "webp", 50),
    ]
    assert len(set(keys)) == len(keys)
    # Two pictures of equal height share no entry, nor do swapped sides.
    wide, high = (dataclasses.replace(base, width=w, height=h) for w, h in ((64, 128), (128, 64)))
    assert image_key("r", "p", wide, "png", 0) != image_key("r", "p", high, "png", 0)


def test_what_changes_no_pixel_changes_no_key() -> None:
    off, less = drawing(1, guidance_scale=1.0), drawing(1, guidance_scale=0.5, negative=embeds_of(2))
    assert image_key("r", "p", off, "png", 0) == image_key("r", "p", less, "png", 90)
    assert image_key("r", "p", off, "webp", 0) == image_key("r", "p", off, "webp", 100)


async def test_a_mailbox_keeps_the_latest_progress_every_picture_and_the_order() -> None:
    box = Mailbox()
    box.put(Queued(0))
    box.put(Started())
    for step in range(1, 1000):
        box.put(Progress(0, step, 1000))
        box.put(Progress(1, step, 1000))
        box.put(Preview(0, step, b"rough"))
        assert len(box) <= 5
    pictures = [Image(index, 7, b"file", 64, 64, cached=False) for index in range(3)]
    for picture in pictures:
        box.put(picture)
    box.put(Finished(False, 1, 2, 3))
    read = [event async for event in box.read()]
    assert read[:2] == [Queued(0), Started()]
    assert read[2:5] == [Progress(0, 999, 1000), Progress(1, 999, 1000), Preview(0, 999, b"rough")]
    assert read[5:] == [*pictures, Finished(False, 1, 2, 3)]


async def test_a_reader_gets_what_came_before_an_error() -> None:
    box = Mailbox()
    read = []

    async def reader() -> None:
        async for event in box.read():
            read.append(event)

    task = asyncio.create_task(reader())
    await asyncio.sleep(0)
    box.put(Started())
    box.fail(ValueError("first"))
    box.fail(ValueError("second"))
    with pytest.raises(ValueError, match="first"):
        await task
    assert read == [Started()]


def test_files_hold_the_pixels() -> None:
    import io

    from PIL import Image as Pillow

    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    for format in ("png", "webp"):
        with Pillow.open(io.BytesIO(encode_picture(pixels, format))) as image:  # type: ignore[arg-type]
            assert np.array_equal(np.asarray(image.convert("RGB")), pixels)
    assert len(encode_picture(pixels, "webp", 10)) < len(encode_picture(pixels, "webp", 100))


def test_settings_come_from_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACETEER_GENERATOR_MAX_QUEUE", "5")
    settings = GeneratorSettings.parse(["--generator-max-batch", "3"])
    assert (settings.generator_max_batch, settings.generator_max_queue, settings.generator_dtype) == (3, 5, "auto")
