"""GeneratorService: protobuf to domain and back.

Knows nothing of models, batches or pictures' insides.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from faceteer.v1 import generator_pb2, generator_pb2_grpc, tensor_pb2
from faceteer_runtime.cache import Cache
from faceteer_runtime.cache_keys import embeds_key
from faceteer_runtime.errors import EmbeddingExpired, InvalidField, NotInBundle, RevisionMismatch
from faceteer_runtime.execution import execution
from faceteer_runtime.tensors import to_array

from faceteer_generator import events
from faceteer_generator.engine import Engine
from faceteer_generator.requests import Format, Generation, Limits

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
        limits: the bundle's defaults and the service's limits.
        cache: where embeddings lie under their ids.
        bundle: its name.
        encoder_revision: of the encoder whose embeddings the decoder was trained on.
        embed_dim: their length.
    """

    def __init__(
        self, engine: Engine, limits: Limits, cache: Cache, *, bundle: str, encoder_revision: str, embed_dim: int
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._cache = cache
        self._encoder_revision = encoder_revision
        self._embed_dim = embed_dim
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
            has_prior=False,
            schedulers=list(SCHEDULERS.values()),
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
        generation = self._generation(request.settings)
        embeds = await self._embeds(request.input, "input")
        negative = await self._embeds(request.negative, "negative") if request.HasField("negative") else None
        run = await self._engine.submit(generation, embeds, negative, preview_every=request.preview_every)
        try:
            async for event in run.events():
                yield self._to_proto(event, generation)
        finally:
            # Also when the caller has gone or its deadline has passed.
            run.close()

    async def EmbedPrompt(
        self, request: generator_pb2.EmbedPromptRequest, context: Any
    ) -> generator_pb2.EmbedPromptResponse:
        """Refused: no bundle format has a prior yet."""
        raise NotInBundle("prior", "this bundle has no prior, so a text cannot become an image embedding here")

    def _generation(self, settings: generator_pb2.GenerationSettings) -> Generation:
        if settings.scheduler and settings.scheduler not in _SCHEDULER_NAMES:
            raise InvalidField("settings.scheduler", f"{int(settings.scheduler)} is no Scheduler of the contract")
        if settings.format and settings.format not in _FORMAT_NAMES:
            raise InvalidField("settings.format", f"{int(settings.format)} is no ImageFormat of the contract")
        return self._limits.settle(
            width=settings.width,
            height=settings.height,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale if settings.HasField("guidance_scale") else None,
            seeds=tuple(settings.seeds),
            scheduler=_SCHEDULER_NAMES.get(settings.scheduler),
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
