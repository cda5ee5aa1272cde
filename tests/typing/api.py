"""The public API as a type checker sees it: checked with mypy --strict, never run.

A signature that changes its types fails here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import assert_type

import faceteer
import numpy as np
import numpy.typing as npt
from PIL import Image


def note(done: int, total: int | None) -> None: ...


async def note_later(done: int, total: int | None) -> None: ...


def look(preview: faceteer.Preview) -> None:
    assert_type(preview.image, Image.Image)


def on_error(index: int, error: faceteer.FaceteerError) -> None:
    assert_type(error.index, int | None)


def blocking(array: npt.NDArray[np.uint8]) -> None:
    tls = faceteer.Tls(root_certificates="ca.pem")
    timeouts = faceteer.Timeouts(render=60, bulk=None)
    retries = faceteer.Retries(attempts=3)
    with faceteer.connect("a:1", timeout=timeouts, tls=tls, retries=retries, metadata={"a": "b"}) as client:
        assert_type(client, faceteer.Client)
        photo = client.open("boat.png")
        assert_type(photo, faceteer.Photo)
        client.open(b"")
        client.open(array, max_features=8, timeout=1.0)
        client.open(Image.new("RGB", (1, 1)))
        assert_type(photo.embeds, npt.NDArray[np.float32])
        assert_type(photo.features[0], faceteer.FiredFeature)
        assert_type(photo.features[:2], faceteer.FiredFeatures)
        assert_type(photo.features.find("night"), faceteer.FiredFeature | None)
        edit = photo.edit().set("night", 1.0).ablate("snow").add(412, 0.5, unit="raw").scale(1, 2).switch("fog")
        assert_type(edit, faceteer.Edit)
        assert_type(edit.report(), faceteer.EditReport)
        assert_type(edit.report().outcomes[0].achieved, float | None)
        assert_type(edit.render(), Image.Image)
        assert_type(edit.render(seed=7, steps=25, progress=True, size=(64, 32), scheduler="ddim"), Image.Image)
        assert_type(edit.render(seeds=[1, 2], progress=note, previews=look), list[Image.Image])
        assert_type(edit.events(seed=1), Iterator[faceteer.EditEvent])
        assert_type(edit.recipe(), faceteer.Recipe)
        assert_type(edit.recipe().hash, str)
        assert_type(photo.edit(faceteer.Recipe.load("night.json")), faceteer.Edit)
        difference = client.diff(photo, photo)
        assert_type(difference, faceteer.Difference)
        assert_type(photo.edit(difference), faceteer.Edit)
        assert_type(client.transfer(photo, photo, coverage=0.9), faceteer.Edit)
        assert_type(client.encode(["a.png"], progress=note, on_error=on_error), npt.NDArray[np.float32])
        assert_type(client.encode([array], on_error="skip"), npt.NDArray[np.float32])
        assert_type(client.encode_texts(["night"]), npt.NDArray[np.float32])
        assert_type(client.status().health, dict[str, str])
        night = client.features["night"]
        assert_type(night, faceteer.Feature)
        assert_type(night.statistics.histogram, faceteer.Histogram | None)
        assert_type(night.examples(), faceteer.FeatureExamples)
        assert_type(night.similar(), faceteer.FeatureList)
        assert_type(client.features.search("snow", alive=True, min_causal_score=0.5), faceteer.FeatureList)
        assert_type(client.features.search("snow")[:3], faceteer.FeatureList)
        assert_type(client.features.search("snow")[0], faceteer.Feature)
        assert_type(client.features.info(), faceteer.LibraryFacts)
        assert_type(night.icon().tiles, tuple[Image.Image, ...])
        assert_type(client.embed_prompt("a boat", seed=3), faceteer.Photo)
        assert_type(client.encode_features(photo), list[faceteer.FeatureEncoding])
        kept = client.encode_features([photo, photo.embeds], on_error="return")
        assert_type(kept, list[faceteer.FeatureEncoding | faceteer.FaceteerError])
        assert_type(client.decode_features([{3: 0.5}]), npt.NDArray[np.float32])
        assert_type(edit.render(keep_layout="image_to_image", strength=0.5), Image.Image)
        assert_type(client.features.list(order="label"), Iterator[faceteer.Feature])

        edit.set("night", 1.0, unit="percent")  # type: ignore[arg-type]
        edit.render(scheduler="euler")  # type: ignore[call-overload]
        edit.render(seed=1, seeds=[2])  # type: ignore[call-overload]
        client.encode([], on_error="ignore")  # type: ignore[arg-type]
        edit.render(keep_layout="tracing")  # type: ignore[call-overload]
        client.features.search("snow", min_score=0.5)  # type: ignore[call-arg]
        client.open(42)  # type: ignore[arg-type]


async def pictures() -> AsyncIterator[bytes]:
    yield b""


async def asynchronous() -> None:
    async with faceteer.connect_async("a:1") as client:
        assert_type(client, faceteer.AsyncClient)
        photo = await client.open("boat.png")
        assert_type(photo, faceteer.AsyncPhoto)
        edit = photo.edit().set("night", 1.0)
        assert_type(edit, faceteer.AsyncEdit)
        assert_type(await edit.render(seed=7, progress=note_later), Image.Image)
        assert_type(await edit.render(seeds=[7]), list[Image.Image])
        async for event in edit.events():
            match event:
                case faceteer.Drawn(index, seed, _, image):
                    assert_type((index, seed, image), tuple[int, int, Image.Image])
                case faceteer.Progress():
                    assert_type(event.step, int)
        assert_type(await client.encode(pictures()), npt.NDArray[np.float32])
        assert_type(await client.features["night"], faceteer.AsyncFeature)
        async for feature in client.features.list():
            assert_type(feature, faceteer.AsyncFeature)
