"""What the generator's calls mean: defaults, rules and the cache, before anything is drawn."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.cache import Cache
from faceteer_runtime.embeddings import Embedding, EmbeddingStore, Source
from faceteer_runtime.errors import InvalidField, NoiseExpired, NotInBundle, RevisionMismatch
from faceteer_runtime.execution import Cost
from faceteer_runtime.image_files import read_image

from faceteer_generator.delivery import from_record
from faceteer_generator.denoise import Denoiser
from faceteer_generator.engine import Engine
from faceteer_generator.generation import Generation
from faceteer_generator.images import covering
from faceteer_generator.inversion import Inversion, InversionFailed
from faceteer_generator.prior import Imagining, TextPrior
from faceteer_generator.prompts import Prompt
from faceteer_generator.requests import (
    DEFAULT_STRENGTH,
    AskedSettings,
    AskedStart,
    GenerationSettings,
    ImageSpec,
    ImageStart,
    Limits,
    NoiseStart,
    image_key,
    noise_id,
    noise_key,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """What is served.

    Attributes:
        bundle: its name.
        kind: of the decoder.
        revision: of the generator part.
        encoder_revision: of the encoder whose embeddings the decoder was trained on.
        embed_dim: their length.
        precision: device kind and dtype of the models.
        max_batch: most images in one step.
        reads_images: whether the decoder can start from images.
    """

    bundle: str
    kind: str
    revision: str
    encoder_revision: str
    embed_dim: int
    precision: str
    max_batch: int
    reads_images: bool


@dataclass(frozen=True)
class Inverted:
    """The noise that draws an image again, float32 [c, h, w], and its name."""

    noise_id: str
    noise: np.ndarray
    cost: Cost


@dataclass(frozen=True)
class Imagined:
    """The embedding of a prompt."""

    embedding: Embedding
    cost: Cost


class GeneratorApplication:
    """One bundle's decoder, and its prior.

    Args:
        identity: of both.
        limits: the bundle's defaults and the service's limits.
        engine: where the models run.
        denoiser: begins inversions.
        cache: where embeddings, noise and images are kept under their names.
        load_prior: blocks, and is called once, when the first prompt comes; None in a bundle without a prior.
        max_image_bytes: most bytes in an image to start from.
        max_image_pixels: most pixels in it.
    """

    def __init__(
        self,
        identity: Identity,
        limits: Limits,
        engine: Engine,
        denoiser: Denoiser,
        cache: Cache,
        *,
        load_prior: Callable[[], TextPrior] | None,
        max_image_bytes: int,
        max_image_pixels: int,
    ) -> None:
        self.identity, self.limits = identity, limits
        self._engine, self._denoiser, self._cache = engine, denoiser, cache
        self._embeddings = EmbeddingStore(cache, identity.encoder_revision, identity.embed_dim)
        self._load_prior = load_prior
        self._prior: TextPrior | None = None
        self._loading = asyncio.Lock()
        self._max_image_bytes, self._max_image_pixels = max_image_bytes, max_image_pixels

    @property
    def has_prior(self) -> bool:
        """Whether prompts can be embedded."""
        return self._load_prior is not None

    async def generate(
        self,
        asked: AskedSettings,
        source: Source,
        negative: Source | None = None,
        start: AskedStart | None = None,
        *,
        preview_every: int = 0,
    ) -> Generation:
        """Begins to draw; whoever reads the events closes the generation.

        Args:
            asked: settings; inverted noise makes DDIM their default scheduler.
            source: embeds, float32 [d], or the id of an embedding.
            negative: what guidance steers away from, likewise; None for the bundle's own.
            start: None for each seed's own noise.
            preview_every: steps between previews; 0 for none.

        Raises:
            FaceteerError: the request cannot be served, or not now.
        """
        if start is not None and start.noise_id is not None:
            asked = dataclasses.replace(asked, scheduler=asked.scheduler or "ddim")
        settings = self.limits.settle(asked)
        embeds = await self._embeds(source)
        against = None if negative is None else await self._embeds(negative)
        origin = None if start is None else await self._start(start, settings)
        specs = [(self._image_key(spec, settings), spec) for spec in settings.images(embeds, against, origin)]
        started = time.perf_counter()
        records = await self._cache.get_many([key for key, _ in specs])
        cached = {index: from_record(record) for index, record in enumerate(records) if record is not None}
        return self._engine.submit(
            settings, specs, cached, preview_every=preview_every, cache_us=_microseconds_since(started)
        )

    async def invert_image(self, image: bytes, asked: AskedSettings, source: Source) -> Inverted:
        """The noise from which DDIM draws the image again; without guidance unless some is asked for.

        Raises:
            FaceteerError: the image cannot be inverted, or not now.
        """
        if not self.identity.reads_images:
            raise NotInBundle("inversion", "this decoder cannot read pictures back into noise")
        guidance = 1.0 if asked.guidance_scale is None else asked.guidance_scale
        settings = self.limits.settle(dataclasses.replace(asked, scheduler="ddim", guidance_scale=guidance))
        embeds = await self._embeds(source)
        pixels = await self._pixels(image, settings, "image")
        spec = settings.images(embeds, None, ImageStart.of(pixels))[0]
        name = noise_id(self.identity.revision, self.identity.precision, spec)
        started = time.perf_counter()
        record = await self._cache.get(noise_key(name))
        cache_us = _microseconds_since(started)
        if record is not None:
            return Inverted(name, np.asarray(record["noise"]), Cost(True, 0, 0, cache_us))
        try:
            ran = await self._engine.run(name, spec.steps, partial(self._denoiser.begin_inversion, spec), _noise_of)
        except InversionFailed as error:
            norm = float(np.linalg.norm(embeds.astype(np.float64)))
            raise InvalidField(
                "input", f"the picture cannot be inverted: {error}; embeds of norm {norm:.3g} may not be its own"
            ) from None
        made_for = np.array([spec.width, spec.height, spec.steps], dtype=np.int32)
        self._cache.put(noise_key(name), {"noise": ran.value, "made_for": made_for})
        return Inverted(name, ran.value, Cost.of([ran], cache_us))

    async def embed_prompt(
        self, text: str, negative: str, seed: int, steps: int, guidance_scale: float | None
    ) -> Imagined:
        """The image embedding that the prior imagines for a text, kept in the cache under its id.

        The arguments are those of :meth:`.prompts.Prompt.checked`.

        Raises:
            FaceteerError: the text cannot be imagined, or not now.
        """
        if self._load_prior is None:
            raise NotInBundle("prior", "this bundle has no prior, so a text cannot become an image embedding here")
        prompt = Prompt.checked(text, negative, seed, steps, guidance_scale)
        key = prompt.key(self.identity.revision, self.identity.precision)
        started = time.perf_counter()
        record = await self._cache.get(key)
        cache_us = _microseconds_since(started)
        if record is not None:
            return Imagined(self._embeddings.keep(np.asarray(record["embeds"])), Cost(True, 0, 0, cache_us))
        prior = await self._loaded_prior(self._load_prior)
        ran = await self._engine.run(key, prompt.calls, partial(Imagining, prior, prompt), _embeds_of)
        if not np.isfinite(ran.value).all():
            raise InvalidField("guidance_scale", "the embedding overflowed; choose a smaller one")
        self._cache.put(key, {"embeds": ran.value})
        return Imagined(self._embeddings.keep(ran.value), Cost.of([ran], cache_us))

    async def _embeds(self, source: Source) -> np.ndarray:
        return (await self._embeddings.resolve(source)).x if isinstance(source, str) else source

    async def _start(self, start: AskedStart, settings: GenerationSettings) -> ImageStart | NoiseStart:
        strength = start.strength
        if strength is not None and not 0 < strength <= 1:
            raise InvalidField("start.strength", f"must be more than 0 and at most 1, not {strength:g}")
        if start.image is not None:
            if not self.identity.reads_images:
                raise NotInBundle("image start", "this decoder cannot read pictures")
            pixels = await self._pixels(start.image, settings, "start.image")
            return ImageStart.of(pixels, DEFAULT_STRENGTH if strength is None else strength)
        if start.noise_id is None:
            raise InvalidField("start", "is empty; give an image or a noise_id, or leave it out")
        if not self.identity.reads_images:
            raise NotInBundle("inversion", "this decoder cannot read pictures back into noise")
        if strength not in (None, 1):
            raise InvalidField("start.strength", f"is always 1 with a noise_id, not {strength:g}")
        if settings.scheduler != "ddim":
            raise InvalidField("settings.scheduler", "must be SCHEDULER_DDIM to draw from inverted noise")
        return await self._noise(start.noise_id, settings)

    async def _noise(self, name: str, settings: GenerationSettings) -> NoiseStart:
        """The noise that an earlier inversion found, for an image of this size in these steps."""
        own = self.identity.revision
        revision = name.rpartition("-")[0]
        record = await self._cache.get(noise_key(name))
        if record is None and len(revision) != len(own):
            # Not an id that any generator has issued.
            raise NoiseExpired(name)
        if revision != own:
            raise RevisionMismatch("generator", revision, own)
        if record is None:
            raise NoiseExpired(name)
        width, height, steps = (int(number) for number in record["made_for"])
        if (width, height, steps) != (settings.width, settings.height, settings.steps):
            raise InvalidField(
                "start.noise_id",
                f"was made for {width} x {height} in {steps} steps, not {settings.width} x {settings.height} in"
                f" {settings.steps}; give those settings, or invert the picture with these",
            )
        return NoiseStart(np.asarray(record["noise"]), name)

    async def _pixels(self, data: bytes, settings: GenerationSettings, field: str) -> np.ndarray:
        return await asyncio.to_thread(
            read_image,
            data,
            partial(covering, width=settings.width, height=settings.height),
            field=field,
            max_bytes=self._max_image_bytes,
            max_pixels=self._max_image_pixels,
        )

    async def _loaded_prior(self, load: Callable[[], TextPrior]) -> TextPrior:
        async with self._loading:
            if self._prior is None:
                # Off the model's thread, which keeps drawing meanwhile.
                try:
                    self._prior = await asyncio.to_thread(load)
                except BundleError as error:
                    _log.error("the prior cannot be used: %s", error)
                    raise NotInBundle(
                        "prior", "the bundle's prior cannot be loaded; the server's log says why"
                    ) from error
            return self._prior

    def _image_key(self, spec: ImageSpec, settings: GenerationSettings) -> str:
        return image_key(self.identity.revision, self.identity.precision, spec, settings.format, settings.quality)


def _noise_of(inversion: Inversion) -> np.ndarray:
    return inversion.noise


def _embeds_of(imagining: Imagining) -> np.ndarray:
    return imagining.embeds()


def _microseconds_since(started: float) -> int:
    return int((time.perf_counter() - started) * 1e6)
