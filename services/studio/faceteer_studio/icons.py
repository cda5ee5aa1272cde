"""Icons made on demand: edits the template, draws each strength, keeps the strip in the cache.

:mod:`faceteer_runtime.icons` says what an icon is.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from faceteer.v1 import edits_pb2, generator_pb2, sae_pb2, tensor_pb2
from faceteer_runtime.cache import Cache
from faceteer_runtime.errors import FaceteerError
from faceteer_runtime.icons import SEED, icon_drawing, icon_key, icon_strip
from faceteer_runtime.single_flight import SingleFlight
from faceteer_runtime.tensors import to_tensor
from PIL import Image

from faceteer_studio.application import together
from faceteer_studio.ports import Call


class Icon(NamedTuple):
    """A strip as a WebP file, and whether it was there already."""

    webp: bytes
    cached: bool


class Icons:
    """Draws icons; the same icon asked for by many at once is drawn once, and not at all when all of them have left."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._flights = SingleFlight()

    async def get(
        self,
        feature: int,
        template: np.ndarray,
        strengths: Sequence[float],
        sae: sae_pb2.GetSaeResponse,
        generator: generator_pb2.GetGeneratorResponse,
        call: Call,
    ) -> Icon:
        """The icon of a feature.

        Args:
            feature: its index.
            template: float32 [d], what it is drawn on.
            strengths: SCALED, left to right.
            sae: what it is edited with.
            generator: what it is drawn with.
            call: whose time it takes.

        Raises:
            FaceteerError: what SAE or generator raise.
        """
        size = generator.sizes[0]
        steps, guidance = icon_drawing(generator.defaults.steps, generator.defaults.guidance_scale)
        key = icon_key(
            generator.revision,
            sae.revision,
            template,
            feature,
            strengths=strengths,
            steps=steps,
            guidance=guidance,
            size=(size.width, size.height),
        )
        settings = generator_pb2.GenerationSettings(
            width=size.width, height=size.height, steps=steps, guidance_scale=guidance, seeds=[SEED]
        )

        led = False

        async def draw() -> bytes:
            nonlocal led
            led = True
            plain = tensor_pb2.EmbedsInput(embeds=to_tensor(template))
            edited = await together([_edited(plain, feature, strength, call) for strength in strengths])
            pictures = await together([_picture(embeds, settings, call) for embeds in (plain, *edited)])
            webp = await asyncio.to_thread(_strip, pictures)
            self._cache.put(key, {"icon": webp})
            return webp

        while True:
            record = await self._cache.get(key)
            webp = record.get("icon") if record is not None else None
            if isinstance(webp, bytes):
                return Icon(webp, True)
            try:
                return Icon(await self._flights.run(key, draw), False)
            except FaceteerError as error:
                # Whoever asked first may have had less time than we have: then again, with our own.
                if led or error.reason != "DEADLINE_EXCEEDED":
                    raise


async def _edited(plain: tensor_pb2.EmbedsInput, feature: int, strength: float, call: Call) -> tensor_pb2.EmbedsInput:
    edit = edits_pb2.Edit(
        feature=edits_pb2.FeatureRef(index=feature), operation=edits_pb2.EDIT_OPERATION_SWITCH, value=strength
    )
    answer = await call.ports.sae.edit_embeds(sae_pb2.EditEmbedsRequest(input=plain, edits=[edit]), call)
    return tensor_pb2.EmbedsInput(embeds=answer.embedding.embeds)


async def _picture(embeds: tensor_pb2.EmbedsInput, settings: generator_pb2.GenerationSettings, call: Call) -> bytes:
    request = generator_pb2.GenerateRequest(input=embeds, settings=settings)
    (picture,) = [
        event.image.data
        async for event in call.ports.generator.generate(request, call)
        if event.WhichOneof("event") == "image"
    ]
    return picture


def _strip(pictures: Sequence[bytes]) -> bytes:
    return icon_strip([Image.open(io.BytesIO(data)) for data in pictures])
