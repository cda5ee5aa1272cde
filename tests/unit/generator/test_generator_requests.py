"""Settings, limits, cache keys and the mailbox: what happens before and after the model."""

from __future__ import annotations

import asyncio
import dataclasses
import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from faceteer_generator.generation import (
    Finished,
    Generation,
    Image,
    ImageFile,
    Preview,
    Progress,
    Queued,
    Started,
)
from faceteer_generator.images import covering, encode_image
from faceteer_generator.requests import AskedSettings, ImageStart, Limits, NoiseStart, image_key, noise_id, noise_key
from faceteer_generator.settings import GeneratorSettings
from faceteer_runtime.bundle import BundleError, BundlePart
from faceteer_runtime.errors import ImageTooLarge, InvalidField
from faceteer_runtime.execution import Cost
from faceteer_runtime.image_files import read_image
from tiny_bundle import picture, picture_bytes
from unit.generator.generator_specs import embeds_of, image_spec

FACTS = {"sizes": [[64, 64], [128, 64]], "steps": 25, "guidance_scale": 2.0, "scheduler": "ddim"}
LIMITS = Limits(((64, 64), (128, 64)), 25, 2.0, "ddim", 200, 4)


def part(**changes: Any) -> BundlePart:
    return BundlePart("generator", "r", Path("generator"), FACTS | changes)


def test_zeros_and_absent_values_mean_the_bundles_defaults() -> None:
    assert Limits.of_bundle(part(), max_steps=200, max_seeds=4) == LIMITS
    settled = LIMITS.settle(AskedSettings())
    assert (settled.width, settled.height, settled.steps, settled.guidance_scale) == (64, 64, 25, 2.0)
    assert (settled.scheduler, settled.format, settled.quality, len(settled.seeds)) == ("ddim", "png", 0, 1)
    assert LIMITS.settle(AskedSettings(guidance_scale=0.0)).guidance_scale == 0.0
    assert LIMITS.settle(AskedSettings(guidance_scale=30.0, steps=200, quality=100, seeds=(1, 2, 3, 4))).steps == 200
    assert LIMITS.settle(AskedSettings(width=128)).width == 128
    assert LIMITS.settle(AskedSettings(seeds=(5, 5, 2))).seeds == (5, 5, 2)


@pytest.mark.parametrize(
    "changes",
    [{"sizes": []}, {"sizes": [[0, 64]]}, {"steps": 0}, {"guidance_scale": 31}, {"guidance_scale": -0.5},
     {"scheduler": "euler"}, {"sizes": 5}, {"steps": "many"}],
    ids=str,
)  # fmt: skip
def test_defaults_that_make_no_sense_are_refused_with_the_bundle(changes: dict[str, Any]) -> None:
    with pytest.raises(BundleError):
        Limits.of_bundle(part(**changes), max_steps=200, max_seeds=4)


@pytest.mark.parametrize(
    "changes",
    [{"sizes": [[1, 1]]}, {"steps": 1}, {"guidance_scale": 0}, {"guidance_scale": 30},
     {"size_multiple": 64, "max_pixels": 4096}],
    ids=str,
)  # fmt: skip
def test_defaults_at_the_ends_of_their_ranges_are_served(changes: dict[str, Any]) -> None:
    limits = Limits.of_bundle(part(**changes), max_steps=200, max_seeds=4)
    settled = limits.settle(AskedSettings())
    assert (settled.steps, settled.guidance_scale) == (limits.steps, limits.guidance_scale)


def test_the_bundles_own_steps_are_served_whatever_the_limit() -> None:
    limits = Limits.of_bundle(part(), max_steps=10, max_seeds=4)
    assert limits.settle(AskedSettings(steps=25)).steps == 25


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"steps": 201}, "steps"),
        ({"guidance_scale": 30.1}, "guidance_scale"),
        ({"guidance_scale": -0.1}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"seeds": (1, 2, 3, 4, 5)}, "seeds"),
        ({"quality": 101}, "quality"),
    ],
)
def test_a_setting_just_outside_its_range_is_refused_by_its_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        LIMITS.settle(AskedSettings(**changes))
    assert refused.value.field == f"settings.{field}"


def test_the_limit_of_lcm_is_its_own() -> None:
    assert LIMITS.settle(AskedSettings(scheduler="lcm", steps=50)).steps == 50
    with pytest.raises(InvalidField, match="1 to 50"):
        LIMITS.settle(AskedSettings(scheduler="lcm", steps=51))


def test_everything_that_changes_a_file_changes_its_key() -> None:
    base = image_spec(1)
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


def test_keys_stay_what_they_are_so_that_caches_outlive_a_release() -> None:
    embeds = np.arange(4, dtype=np.float32)
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    spec = image_spec(embeds=embeds, negative=embeds + 1, width=64, height=128, steps=10, seed=7)
    start = ImageStart.of(pixels, 0.5)
    digests = [
        image_key("r", "cpu/float32", dataclasses.replace(spec, start=origin), "webp", 50).rpartition(":")[2][:16]
        for origin in (None, start, NoiseStart(np.zeros((4, 2, 2), np.float32), "r-1"))
    ]
    assert digests == ["42b53038574badee", "2f305c9d383309eb", "f35fb00f272333fd"]
    assert noise_id("r", "cpu/float32", dataclasses.replace(spec, start=start)).startswith("r-f767b74b6d2c3b57")


def test_what_changes_no_pixel_changes_no_key() -> None:
    off, less = image_spec(1, guidance_scale=1.0), image_spec(1, guidance_scale=0.5, negative=embeds_of(2))
    assert image_key("r", "p", off, "png", 0) == image_key("r", "p", less, "png", 90)
    assert image_key("r", "p", off, "webp", 0) == image_key("r", "p", off, "webp", 100)


def generation(seeds: tuple[int, ...] = (7,), cached: dict[int, ImageFile] | None = None) -> Generation:
    settings = LIMITS.settle(AskedSettings(seeds=seeds))
    return Generation(settings, 1, cached or {}, 3, lambda _: None)


FILE = ImageFile(b"file", 64, 64)


async def test_a_slow_reader_finds_the_latest_progress_every_image_and_the_order() -> None:
    under_way = generation((7, 8, 9))
    under_way.queued(0)
    under_way.start()
    for step in range(1, 1000):
        under_way.progress(0, step, 1000)
        under_way.progress(1, step, 1000)
        under_way.preview(0, step, b"rough")
        assert len(under_way) <= 5
    under_way.compute_s = 2e-6
    for index in range(3):
        under_way.deliver(index, FILE)
    read = [event async for event in under_way.events()]
    assert read[:2] == [Queued(0), Started()]
    assert read[2:5] == [Progress(0, 999, 1000), Progress(1, 999, 1000), Preview(0, 999, b"rough")]
    assert read[5:8] == [Image(index, 7 + index, FILE, cached=False) for index in range(3)]
    waited = int(under_way.waited_s * 1e6)
    assert read[8:] == [Finished(Cost(cached=False, queue_us=waited, compute_us=2, cache_us=3))]


async def test_events_read_between_two_steps_are_not_replaced() -> None:
    under_way = generation()
    reading = under_way.events()
    for step in (1, 2):
        under_way.progress(0, step, 9)
        assert await anext(reading) == Progress(0, step, 9)


async def test_cached_images_come_after_started_and_before_drawn_ones() -> None:
    under_way = generation((7, 8), {1: FILE})
    under_way.queued(5)
    assert len(under_way) == 1
    assert under_way.start()
    assert not under_way.start()
    under_way.deliver(0, FILE)
    read = [event async for event in under_way.events()]
    assert read[:-1] == [Queued(5), Started(), Image(1, 8, FILE, cached=True), Image(0, 7, FILE, cached=False)]
    whole = generation((7,), {0: FILE})
    whole.queued(5)
    read = [event async for event in whole.events()]
    assert read[1:] == [Started(), Image(0, 7, FILE, cached=True), Finished(Cost(True, 0, 0, 3))]


async def test_a_reader_gets_what_came_before_an_error() -> None:
    under_way = generation()
    read = []

    async def reader() -> None:
        async for event in under_way.events():
            read.append(event)

    task = asyncio.create_task(reader())
    await asyncio.sleep(0)
    under_way.start()
    under_way.fail(ValueError("first"))
    under_way.fail(ValueError("second"))
    with pytest.raises(ValueError, match="first"):
        await task
    assert read == [Started()]


def test_files_hold_the_pixels() -> None:
    import io

    from PIL import Image as Pillow

    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    for format in ("png", "webp"):
        with Pillow.open(io.BytesIO(encode_image(pixels, format))) as image:  # type: ignore[arg-type]
            assert np.array_equal(np.asarray(image.convert("RGB")), pixels)
    assert len(encode_image(pixels, "webp", 10)) < len(encode_image(pixels, "webp", 100))


def test_settings_come_from_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACETEER_GENERATOR_MAX_QUEUE", "5")
    settings = GeneratorSettings.parse(["--generator-max-batch", "3"])
    assert (settings.generator_max_batch, settings.generator_max_queue, settings.generator_dtype) == (3, 5, "auto")


def test_other_sizes_are_served_by_the_bundles_rule() -> None:
    limits = Limits.of_bundle(part(size_multiple=64, max_pixels=1024 * 1024), max_steps=200, max_seeds=4)
    for width, height in ((512, 512), (768, 512), (64, 16384), (1024, 1024), (128, 64)):
        settled = limits.settle(AskedSettings(width=width, height=height))
        assert (settled.width, settled.height) == (width, height)
    for width, height in ((1088, 1024), (512, 500), (32, 64), (64, 16448), (2**32 - 64, 64)):
        with pytest.raises(InvalidField, match="multiples of 64 up to 1048576 pixels in all"):
            limits.settle(AskedSettings(width=width, height=height))
    with pytest.raises(InvalidField, match=r"sizes are 64 x 64, 128 x 64$"):
        LIMITS.settle(AskedSettings(width=192))


@pytest.mark.parametrize(
    "changes",
    [{"size_multiple": 64}, {"max_pixels": 4096}, {"size_multiple": 64, "max_pixels": 4000}, {"size_multiple": "a"}],
    ids=str,
)
def test_a_size_rule_that_makes_no_sense_is_refused_with_the_bundle(changes: dict[str, Any]) -> None:
    with pytest.raises(BundleError):
        Limits.of_bundle(part(**changes), max_steps=200, max_seeds=4)


def test_what_a_picture_starts_from_is_in_its_key() -> None:
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    other = pixels.copy()
    other[5, 5] = 1
    noise = np.zeros((4, 16, 16), dtype=np.float32)
    starts = [
        None,
        ImageStart.of(pixels, 0.7),
        ImageStart.of(pixels, 0.4),
        ImageStart.of(other, 0.7),
        NoiseStart(noise, "r-1"),
        NoiseStart(noise, "r-2"),
    ]
    keys = {image_key("r", "cpu/float32", image_spec(1, steps=10, start=start), "png", 0) for start in starts}
    assert len(keys) == len(starts)
    same = [image_key("r", "cpu/float32", image_spec(1, seed=s, start=starts[4]), "png", 0) for s in (1, 2)]
    assert same[0] == same[1]
    # A square and a strip of the same bytes are two pictures.
    assert ImageStart.of(pixels).digest != ImageStart.of(pixels.reshape(32, 128, 3)).digest


@pytest.mark.parametrize(("steps", "strength", "runs"), [(10, 0.7, 7), (10, 0.01, 1), (10, 1.0, 10), (50, 0.29, 14)])
def test_the_share_of_steps_that_run_is_rounded_down_and_never_none(steps: int, strength: float, runs: int) -> None:
    start = ImageStart.of(np.zeros((64, 64, 3), dtype=np.uint8), float(np.float32(strength)))
    assert image_spec(1, steps=steps, start=start).run_steps == runs


def test_everything_that_changes_noise_changes_its_name() -> None:
    start = ImageStart.of(np.zeros((64, 64, 3), dtype=np.uint8))
    base = image_spec(1, start=start)
    changes: list[dict[str, Any]] = [
        {"start": ImageStart.of(np.ones((64, 64, 3), dtype=np.uint8))},
        {"embeds": embeds_of(2)},
        {"negative": embeds_of(2)},
        {"width": 128},
        {"steps": 5},
        {"guidance_scale": 2.5},
    ]
    names = {noise_id("r", "cpu/float32", dataclasses.replace(base, **change)) for change in changes}
    names |= {noise_id(*where, base) for where in (("r", "cpu/float32"), ("s", "cpu/float32"), ("r", "cpu/float16"))}
    assert len(names) == len(changes) + 3
    assert noise_id("r", "cpu/float32", dataclasses.replace(base, seed=9)) in names
    assert noise_key(noise_id("r", "cpu/float32", base)).startswith("faceteer:1:noise:r:")
    assert noise_key("made up").startswith("faceteer:1:noise:none:")


to_64 = partial(covering, width=64, height=64)


def test_a_picture_is_scaled_to_cover_and_cropped_around_its_middle() -> None:
    wide = PIL.Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    pixels = read_image(buffer.getvalue(), to_64, field="image", max_bytes=10_000, max_pixels=30_000)
    assert pixels.shape == (64, 64, 3)
    # Resampling smears the edges a little.
    assert np.abs(pixels[:, 4:-4].astype(int) - (0, 0, 255)).max() <= 8
    clear = PIL.Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    buffer = io.BytesIO()
    clear.save(buffer, "WEBP", lossless=True)
    assert (read_image(buffer.getvalue(), to_64, field="image", max_bytes=10_000, max_pixels=4096) == 255).all()
    with pytest.raises(ImageTooLarge):
        read_image(buffer.getvalue(), to_64, field="image", max_bytes=10_000, max_pixels=4095)


def test_a_picture_of_the_right_size_is_read_as_it_is() -> None:
    original = np.asarray(picture(3))
    data = picture_bytes(3)
    assert np.array_equal(read_image(data, to_64, field="image", max_bytes=10**6, max_pixels=4096), original)
    turned = picture(3)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    upright = read_image(buffer.getvalue(), to_64, field="image", max_bytes=10**6, max_pixels=4096)
    assert np.array_equal(upright, np.rot90(original, -1))
