"""GeneratorService: protobuf to domain and back.

Knows nothing of models, batches or pictures' insides.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from faceteer.v1 import generator_pb2, generator_pb2_grpc, tensor_pb2
from faceteer_runtime.cache import Cache
from faceteer_runtime.cache_keys import embeds_key
from faceteer_runtime.errors import EmbeddingExpired, InvalidField, NotInBundle, RevisionMismatch
from faceteer_runtime.execution import execution
from faceteer_runtime.tensors import to_array, to_tensor

from faceteer_generator import events
from faceteer_generator.engine import Engine
from faceteer_generator.inverter import Inverter
from faceteer_generator.pictures import read_picture
from faceteer_generator.prompts import Prompt, Prompts
from faceteer_generator.requests import DEFAULT_STRENGTH, Format, Generation, ImageStart, Limits, NoiseStart

SCHEDULERS = {
    "ddpm": generator_pb2.SCHEDULER_DDPM,
    "ddim": generator_pb2.SCHEDULER_DDIM,
    "dpm_solver_pp": generator_pb2.SCHEDULER_DPM_SOLVER_PP,
    "lcm": generator_pb2.SCHEDULER_LCM,
}
FORMATS: dict[Format, generator_pb2.ImageFormat.ValueType] = {
    "png": generator_pb2.IMAGE_FORMAT_PNG,
    "webp": generator_pb2.IMAGE_FORMAT_WEBP,
}
_SCHEDULER_NAMES = {value: name for name, value in SCHEDULERS.items()}
_FORMAT_NAMES: dict[int, Format] = {value: name for name, value in FORMATS.items()}


class GeneratorServicer(generator_pb2_grpc.GeneratorServiceServicer):
    """Serves one bundle's decoder.

    Args:
        engine: draws.
        inverter: inverts pictures; None where the decoder cannot.
        prompts: imagines embeddings; None in a bundle without a prior.
        limits: the bundle's defaults and the service's limits.
        cache: where embeddings lie under their ids.
        bundle: its name.
        kind: of the decoder.
        encoder_revision: of the encoder whose embeddings the decoder was trained on.
        embed_dim: their length.
        max_image_bytes: most bytes in a picture to start from.
        max_image_pixels: most pixels in it.
    """

    def __init__(
        self,
        engine: Engine,
        inverter: Inverter | None,
        prompts: Prompts | None,
        limits: Limits,
        cache: Cache,
        *,
        bundle: str,
        kind: str,
        encoder_revision: str,
        embed_dim: int,
        max_image_bytes: int,
        max_image_pixels: int,
    ) -> None:
        self._engine = engine
        self._inverter = inverter
        self._prompts = prompts
        self._limits = limits
        self._cache = cache
        self._encoder_revision = encoder_revision
        self._embed_dim = embed_dim
        self._image_limits = {"max_bytes": max_image_bytes, "max_pixels": max_image_pixels}
        defaults = limits.settle(seeds=(0,))
        self._description = generator_pb2.GetGeneratorResponse(
            revision=engine.revision,
            bundle=bundle,
            encoder_revision=encoder_revision,
            embed_dim=embed_dim,
            sizes=[generator_pb2.Size(width=width, height=height) for width, height in limits.sizes],
            defaults=_settings_to_proto(defaults, with_seeds=False),
            max_steps=limits.max_steps,
            max_seeds=limits.max_seeds,
            max_batch=engine.max_batch,
            has_prior=prompts is not None,
            schedulers=list(SCHEDULERS.values()),
            kind=kind,
            reads_images=inverter is not None,
            size_multiple=limits.size_multiple,
            max_pixels=limits.max_pixels,
        )

    async def GetGenerator(
        self, request: generator_pb2.GetGeneratorRequest, context: Any
    ) -> generator_pb2.GetGeneratorResponse:
        """The decoder, its defaults and limits."""
        return self._description

    async def Generate(
        self, request: generator_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        """One picture for each seed, with events on the way."""
        from_noise = request.HasField("start") and request.start.WhichOneof("source") == "noise_id"
        generation = self._generation(request.settings, scheduler="ddim" if from_noise else None)
        embeds = await self._embeds(request.input, "input")
        negative = await self._embeds(request.negative, "negative") if request.HasField("negative") else None
        start = await self._start(request.start, generation) if request.HasField("start") else None
        run = await self._engine.submit(generation, embeds, negative, start=start, preview_every=request.preview_every)
        try:
            async for event in run.events():
                yield self._to_proto(event, generation)
        finally:
            # Also when the caller has gone or its deadline has passed.
            run.close()

    async def EmbedPrompt(
        self, request: generator_pb2.EmbedPromptRequest, context: Any
    ) -> generator_pb2.EmbedPromptResponse:
        """The image embedding that the prior imagines for a text."""
        if self._prompts is None:
            raise NotInBundle("prior", "this bundle has no prior, so a text cannot become an image embedding here")
        prompt = Prompt.checked(
            request.prompt,
            request.negative_prompt,
            request.seed,
            request.steps,
            request.guidance_scale if request.HasField("guidance_scale") else None,
        )
        imagined = await self._prompts.embed(prompt)
        return generator_pb2.EmbedPromptResponse(
            embedding=tensor_pb2.Embedding(embedding_id=imagined.embedding_id, embeds=to_tensor(imagined.embeds)),
            execution=execution(
                self._prompts.revision, imagined.cached, imagined.queue_us, imagined.compute_us, imagined.cache_us
            ),
        )

    async def InvertImage(
        self, request: generator_pb2.InvertImageRequest, context: Any
    ) -> generator_pb2.InvertImageResponse:
        """The noise that draws a picture again."""
        if self._inverter is None:
            raise NotInBundle("inversion", "this decoder cannot read pictures back into noise")
        generation = self._generation(request.settings, scheduler="ddim", ignore_scheduler=True, guidance=1.0)
        embeds = await self._embeds(request.input, "input")
        pixels = await self._pixels(request.image, generation, "image")
        (drawing, *_) = generation.drawings(embeds, None, ImageStart.of(pixels))
        inverted = await self._inverter.invert(drawing)
        return generator_pb2.InvertImageResponse(
            noise_id=inverted.noise_id,
            noise=to_tensor(inverted.noise),
            execution=execution(
                self._inverter.revision, inverted.cached, inverted.queue_us, inverted.compute_us, inverted.cache_us
            ),
        )

    async def _start(self, start: generator_pb2.GenerationStart, generation: Generation) -> ImageStart | NoiseStart:
        strength = start.strength if start.HasField("strength") else None
        if strength is not None and not 0 < strength <= 1:
            raise InvalidField("start.strength", f"must be more than 0 and at most 1, not {strength:g}")
        match start.WhichOneof("source"):
            case "image":
                if self._inverter is None:
                    raise NotInBundle("image start", "this decoder cannot read pictures")
                pixels = await self._pixels(start.image, generation, "start.image")
                return ImageStart.of(pixels, DEFAULT_STRENGTH if strength is None else strength)
            case "noise_id":
                if self._inverter is None:
                    raise NotInBundle("inversion", "this decoder cannot read pictures back into noise")
                if strength not in (None, 1):
                    raise InvalidField("start.strength", f"is always 1 with a noise_id, not {strength:g}")
                if generation.scheduler != "ddim":
                    raise InvalidField("settings.scheduler", "must be SCHEDULER_DDIM to draw from inverted noise")
                return await self._inverter.recall(
                    start.noise_id, width=generation.width, height=generation.height, steps=generation.steps
                )
            case _:
                raise InvalidField("start", "is empty; give an image or a noise_id, or leave it out")

    async def _pixels(self, data: bytes, generation: Generation, field: str) -> np.ndarray:
        size = (generation.width, generation.height)
        return await asyncio.to_thread(read_picture, data, *size, field=field, **self._image_limits)

    def _generation(
        self,
        settings: generator_pb2.GenerationSettings,
        *,
        scheduler: str | None = None,
        ignore_scheduler: bool = False,
        guidance: float | None = None,
    ) -> Generation:
        """Settings in force; ``scheduler`` and ``guidance`` where the request leaves them out."""
        if settings.scheduler and settings.scheduler not in _SCHEDULER_NAMES:
            raise InvalidField("settings.scheduler", f"{int(settings.scheduler)} is no Scheduler of the contract")
        if settings.format and settings.format not in _FORMAT_NAMES:
            raise InvalidField("settings.format", f"{int(settings.format)} is no ImageFormat of the contract")
        return self._limits.settle(
            width=settings.width,
            height=settings.height,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale if settings.HasField("guidance_scale") else guidance,
            seeds=tuple(settings.seeds),
            scheduler=scheduler if ignore_scheduler else _SCHEDULER_NAMES.get(settings.scheduler, scheduler),
            format=_FORMAT_NAMES.get(settings.format, "png"),
            quality=settings.quality,
        )

    async def _embeds(self, source: tensor_pb2.EmbedsInput, field: str) -> np.ndarray:
        which = source.WhichOneof("source")
        if which == "embeds":
            return to_array(source.embeds, field=f"{field}.embeds", shape=(self._embed_dim,))
        if which is None:
            raise InvalidField(field, "is missing; give embeds or the embedding_id of an earlier answer")
        record = await self._cache.get(embeds_key(source.embedding_id))
        if record is None:
            raise EmbeddingExpired(source.embedding_id)
        revision = source.embedding_id.partition("-")[0]
        if revision != self._encoder_revision:
            raise RevisionMismatch("encoder", revision, self._encoder_revision)
        embeds = np.asarray(record["embeds"], dtype=np.float32)
        if embeds.shape != (self._embed_dim,) or not np.isfinite(embeds).all():
            raise EmbeddingExpired(source.embedding_id)
        return embeds

    def _to_proto(self, event: events.Event, generation: Generation) -> generator_pb2.GenerateResponse:
        answer = generator_pb2.GenerateResponse
        format = FORMATS[generation.format]
        match event:
            case events.Queued(position):
                return answer(queued=generator_pb2.Queued(position=position))
            case events.Started():
                settings = _settings_to_proto(generation)
                return answer(started=generator_pb2.Started(seeds=generation.seeds, settings=settings))
            case events.Progress(index, step, steps):
                return answer(progress=generator_pb2.Progress(index=index, step=step, steps=steps))
            case events.Preview(index, step, data):
                return answer(preview=generator_pb2.Preview(index=index, step=step, data=data, format=format))
            case events.Image():
                image = generator_pb2.Image(
                    index=event.index,
                    seed=event.seed,
                    data=event.data,
                    format=format,
                    width=event.width,
                    height=event.height,
                    cached=event.cached,
                )
                return answer(image=image)
            case events.Finished(cached, queue_us, compute_us, cache_us):
                ran = execution(self._engine.revision, cached, queue_us, compute_us, cache_us)
                return answer(finished=generator_pb2.Finished(execution=ran))


def _settings_to_proto(generation: Generation, *, with_seeds: bool = True) -> generator_pb2.GenerationSettings:
    return generator_pb2.GenerationSettings(
        width=generation.width,
        height=generation.height,
        steps=generation.steps,
        guidance_scale=generation.guidance_scale,
        seeds=generation.seeds if with_seeds else (),
        scheduler=SCHEDULERS[generation.scheduler],
        format=FORMATS[generation.format],
        quality=generation.quality,
    )
