"""The bundle's own pictures pass, compressed ones mostly too, and everything else that people try is warned about.

The bundle is given its novelty here, from pictures drawn for it, so that the test says what learn-novelty gives.
"""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from faceteer_encoder.model import load_encoder
from faceteer_postcards.render import render
from faceteer_postcards.world import sample_scene
from faceteer_runtime.bundle import Bundle
from faceteer_sae.features import Origin, encode, novelty_warnings
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.statistics import load_statistics
from faceteer_trainer.corpus.shards import CorpusCard, Shard, shard_name, write_embeds
from faceteer_trainer.library.statistics import learn_novelty
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

pytestmark = pytest.mark.slow

SHIPPED = Path(__file__).parents[3] / "deploy" / "bundles" / "postcards"
# Scenes that no part of the bundle was trained on.
FIRST, CORPUS, FRESH = 50_000_000, 3000, 600

Warned = Callable[[Iterable[Image.Image]], float]


def file(image: Image.Image, **options: object) -> bytes:
    """As a person would send it: a PNG, or a JPEG where a quality is given."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if options else "PNG", **options)
    return buffer.getvalue()


def scenes(first: int, count: int) -> list[Image.Image]:
    return [Image.fromarray(np.asarray(render(sample_scene(first + n)))) for n in range(count)]


@pytest.fixture(scope="module")
def warned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., float]:
    """Says on what share of pictures the bundle warns."""
    folder = tmp_path_factory.mktemp("novelty")
    bundle, corpus = folder / "bundle", folder / "corpus"
    shutil.copytree(SHIPPED, bundle)
    encoder, preprocessor = load_encoder(bundle / "encoder")

    def embeds(images: Iterable[Image.Image], **options: object) -> np.ndarray:
        pixels = [preprocessor.pixels(file(image.convert("RGB"), **options)) for image in images]
        return np.concatenate([encoder.encode_images(pixels[at : at + 100]) for at in range(0, len(pixels), 100)])

    revision, x = Bundle.open(bundle).part("encoder").revision, embeds(scenes(FIRST, CORPUS))
    corpus.mkdir()
    write_embeds(corpus / shard_name(0), x, dtype="float32", encoder_revision=revision)
    CorpusCard("own", revision, x.shape[1], "float32", (Shard(shard_name(0), len(x)),)).write(corpus)
    learn_novelty(bundle, corpus)
    sae = SparseAutoencoder.load(bundle / "sae")
    statistics = load_statistics(bundle / "sae", sae.d_in, sae.d_sae)

    def share(images: Iterable[Image.Image], **options: object) -> float:
        found = encode(sae, statistics, list(embeds(images, **options)))
        return float(np.mean([bool(novelty_warnings(statistics, one, Origin("postcards"))) for one in found]))

    return share


@pytest.fixture(scope="module")
def fresh() -> list[Image.Image]:
    return scenes(FIRST + CORPUS, FRESH)


def photographs() -> list[Image.Image]:
    """The two that scikit-learn ships, and pieces of them."""
    rng, found = random.Random(0), []
    for array in load_sample_images().images:
        whole = Image.fromarray(array)
        found.append(whole)
        for _ in range(24):
            side = rng.randint(min(whole.size) // 3, min(whole.size))
            left, top = rng.randint(0, whole.width - side), rng.randint(0, whole.height - side)
            found.append(whole.crop((left, top, left + side, top + side)))
    return found


def scribbles() -> list[Image.Image]:
    """Strokes of a felt pen on white."""
    rng, found = random.Random(1), []
    for _ in range(40):
        image = Image.new("RGB", (256, 256), "white")
        for _ in range(rng.randint(3, 9)):
            points = [(rng.randint(0, 255), rng.randint(0, 255)) for _ in range(rng.randint(2, 6))]
            colour = tuple(rng.randint(0, 200) for _ in range(3))
            ImageDraw.Draw(image).line(points, fill=colour, width=rng.randint(2, 8))
        found.append(image)
    return found


def faces() -> list[Image.Image]:
    """Emoji: a yellow disc with two eyes and a mouth."""
    rng, found = random.Random(2), []
    for _ in range(40):
        image = Image.new("RGB", (136, 136), "white")
        draw = ImageDraw.Draw(image)
        draw.ellipse((6, 6, 130, 130), fill=(255, rng.randint(190, 225), rng.randint(40, 90)))
        for x in (44, 92):
            draw.ellipse((x - 8, 42, x + 8, 42 + rng.randint(8, 26)), fill=(90, 50, 20))
        draw.arc((38, 50, 98, 104), rng.randint(0, 30), rng.randint(120, 180), fill=(90, 50, 20), width=6)
        found.append(image)
    return found


def pages() -> list[Image.Image]:
    """Text, black on white."""
    rng, found = random.Random(3), []
    for _ in range(20):
        image = Image.new("RGB", (400, 400), "white")
        for y in range(10, 390, 14):
            line = "".join(rng.choice("abcdefgh ijklmn opq") for _ in range(60))
            ImageDraw.Draw(image).text((10, y), line, fill="black")
        found.append(image)
    return found


def noise() -> list[Image.Image]:
    rng = np.random.default_rng(4)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(20)]


@pytest.mark.parametrize("kind", [photographs, scribbles, faces, pages, noise])
def test_pictures_of_another_kind_are_warned_about(kind: Callable[[], list[Image.Image]], warned: Warned) -> None:
    assert warned(kind()) == 1.0


def test_fresh_pictures_of_the_bundles_kind_are_not(warned: Warned, fresh: list[Image.Image]) -> None:
    # At most 1 % is meant; of 600 pictures that is 6, and 9 are within chance.
    assert warned(fresh) <= 9 / FRESH


@pytest.mark.parametrize(("quality", "most"), [(50, 0.15), (30, 0.22), (20, 0.32)])
def test_compression_is_mostly_forgiven(
    quality: int, most: float, warned: Callable[..., float], fresh: list[Image.Image]
) -> None:
    # From 20,000 pictures it is 6, 10 and 16 % (docs/log.md); the limit that 3,000 give varies more.
    assert warned(fresh, quality=quality) <= most
