"""Icons made when they are asked for: edits the template, draws each strength, keeps the strip in the cache.

Knows nothing of libraries; what an icon is stands in :mod:`faceteer_runtime.icons`.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from faceteer.v1 import edits_pb2, generator_pb2, sae_pb2, tensor_pb2
from faceteer_runtime.cache import Cache
from faceteer_runtime.errors import FaceteerError
from faceteer_runtime.icons import SEED, STRENGTHS, icon_drawing, icon_key, icon_strip
from faceteer_runtime.single_flight import SingleFlight
from faceteer_runtime.tensors import to_tensor
from PIL import Image

from faceteer_studio.edit_image import Remaining
from faceteer_studio.identity import Identity
from faceteer_studio.upstreams import Upstreams

T = TypeVar("T")


class Icon(NamedTuple):
    """A strip as a WebP file, the decoder's revision, and whether it was there already."""

    webp: bytes
    revision: str
    cached: bool


class Icons:
    """Draws icons; the same icon asked for by many at once is drawn once, and not at all when all of them have left."""

    def __init__(self, upstreams: Upstreams, cache: Cache, identity: Identity) -> None:
        self._upstreams = upstreams
        self._cache = cache
        self._identity = identity
        self._flights = SingleFlight()

    async def get(self, feature: int, template: np.ndarray, remaining: Remaining) -> Icon:
        """The icon of a feature.

        Args:
            feature: its index.
            template: float32 [d], what it is drawn on.
            remaining: seconds left of the caller's deadline.

        Raises:
            FaceteerError: what SAE or generator raise.
        """
        studio = await self._identity.get(remaining())
        generator, size = studio.generator, studio.generator.sizes[0]
        steps, guidance = icon_drawing(generator.defaults.steps, generator.defaults.guidance_scale)
        key = icon_key(
            generator.revision,
            studio.sae.revision,
            template,
            feature,
            steps=steps,
            guidance=guidance,
            size=(size.width, size.height),
        )
        settings = generator_pb2.GenerationSettings(
            width=size.width, height=size.height, steps=steps, guidance_scale=guidance, seeds=[SEED]
        )
        while True:
            record = await self._cache.get(key)
            webp = record.get("icon") if record is not None else None
            if isinstance(webp, bytes):
                return Icon(webp, generator.revision, True)
            timeout = remaining()
            try:
                drawn = await self._flights.run(key, lambda: self._draw(key, feature, template, settings, timeout))  # noqa: B023
                return Icon(drawn, generator.revision, False)
            except FaceteerError as error:
                # Whoever asked first had less time than we have: again, with our own.
                left = remaining()
                if error.reason != "DEADLINE_EXCEEDED" or timeout is None or (left is not None and left <= 0.01):
                    raise

    async def _draw(
        self,
        key: str,
        feature: int,
        template: np.ndarray,
        settings: generator_pb2.GenerationSettings,
        timeout: float | None,
    ) -> bytes:
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout

        def left() -> float | None:
            return None if deadline is None else max(deadline - loop.time(), 0.0)

        plain = tensor_pb2.EmbedsInput(embeds=to_tensor(template))
        edited = await together([self._edited(plain, feature, strength, left) for strength in STRENGTHS])
        pictures = await together([self._picture(embeds, settings, left) for embeds in (plain, *edited)])
        webp = await asyncio.to_thread(_strip, pictures)
        self._cache.put(key, {"icon": webp})
        return webp

    async def _edited(
        self, plain: tensor_pb2.EmbedsInput, feature: int, strength: float, left: Remaining
    ) -> tensor_pb2.EmbedsInput:
        edit = edits_pb2.Edit(
            feature=edits_pb2.FeatureRef(index=feature), operation=edits_pb2.EDIT_OPERATION_SET, value=strength
        )
        request = sae_pb2.EditEmbedsRequest(input=plain, edits=[edit])
        answer = await self._upstreams.sae.call("EditEmbeds", request, left())
        return tensor_pb2.EmbedsInput(embeds=answer.embedding.embeds)

    async def _picture(
        self, embeds: tensor_pb2.EmbedsInput, settings: generator_pb2.GenerationSettings, left: Remaining
    ) -> bytes:
        request = generator_pb2.GenerateRequest(input=embeds, settings=settings)
        pictures = [
            event.image.data
            async for event in self._upstreams.generator.stream("Generate", request, left())
            if event.WhichOneof("event") == "image"
        ]
        return bytes(pictures[0])


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; when one fails, or the caller leaves, the others are stopped before the error goes on."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _strip(pictures: Sequence[bytes]) -> bytes:
    return icon_strip([Image.open(io.BytesIO(data)) for data in pictures])
