"""GeneratorService: protobuf to domain and back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from faceteer.v1 import generator_pb2, generator_pb2_grpc, tensor_pb2
from faceteer_runtime.embeddings import Source
from faceteer_runtime.errors import InvalidField
from faceteer_runtime.execution import execution
from faceteer_runtime.tensors import to_embeds, to_tensor

from faceteer_generator import generation
from faceteer_generator.application import GeneratorApplication
from faceteer_generator.requests import AskedSettings, AskedStart, Format, GenerationSettings

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
    """Serves a :class:`~faceteer_generator.application.GeneratorApplication`."""

    def __init__(self, application: GeneratorApplication) -> None:
        self._application = application
        self._revision = application.identity.revision

    async def GetGenerator(
        self, request: generator_pb2.GetGeneratorRequest, context: Any
    ) -> generator_pb2.GetGeneratorResponse:
        """The decoder, its defaults and limits."""
        identity, limits = self._application.identity, self._application.limits
        defaults = _settings_to_proto(limits.settle(AskedSettings()))
        defaults.ClearField("seeds")
        return generator_pb2.GetGeneratorResponse(
            revision=identity.revision,
            bundle=identity.bundle,
            encoder_revision=identity.encoder_revision,
            embed_dim=identity.embed_dim,
            sizes=[generator_pb2.Size(width=width, height=height) for width, height in limits.sizes],
            defaults=defaults,
            max_steps=limits.max_steps,
            max_seeds=limits.max_seeds,
            max_batch=identity.max_batch,
            has_prior=self._application.has_prior,
            schedulers=list(SCHEDULERS.values()),
            kind=identity.kind,
            reads_images=identity.reads_images,
            size_multiple=limits.size_multiple,
            max_pixels=limits.max_pixels,
        )

    async def Generate(
        self, request: generator_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        """One image for each seed, with events on the way."""
        under_way = await self._application.generate(
            _asked_settings(request.settings),
            self._embeds(request.input, "input"),
            self._embeds(request.negative, "negative") if request.HasField("negative") else None,
            _asked_start(request.start) if request.HasField("start") else None,
            preview_every=request.preview_every,
        )
        try:
            async for event in under_way.events():
                yield self._event_to_proto(event, under_way.settings)
        finally:
            # Also when the caller has gone or its deadline has passed.
            under_way.close()

    async def EmbedPrompt(
        self, request: generator_pb2.EmbedPromptRequest, context: Any
    ) -> generator_pb2.EmbedPromptResponse:
        """The image embedding that the prior imagines for a text."""
        imagined = await self._application.embed_prompt(
            request.prompt,
            request.negative_prompt,
            request.seed,
            request.steps,
            request.guidance_scale if request.HasField("guidance_scale") else None,
        )
        return generator_pb2.EmbedPromptResponse(
            embedding=tensor_pb2.Embedding(
                embedding_id=imagined.embedding.embedding_id, embeds=to_tensor(imagined.embedding.x)
            ),
            execution=execution(self._revision, *imagined.cost),
        )

    async def InvertImage(
        self, request: generator_pb2.InvertImageRequest, context: Any
    ) -> generator_pb2.InvertImageResponse:
        """The noise that draws an image again."""
        inverted = await self._application.invert_image(
            request.image, _asked_settings(request.settings), self._embeds(request.input, "input")
        )
        return generator_pb2.InvertImageResponse(
            noise_id=inverted.noise_id,
            noise=to_tensor(inverted.noise),
            execution=execution(self._revision, *inverted.cost),
        )

    def _embeds(self, source: tensor_pb2.EmbedsInput, field: str) -> Source:
        return to_embeds(source, field=field, dim=self._application.identity.embed_dim)

    def _event_to_proto(self, event: generation.Event, settings: GenerationSettings) -> generator_pb2.GenerateResponse:
        answer = generator_pb2.GenerateResponse
        format = FORMATS[settings.format]
        match event:
            case generation.Queued(position):
                return answer(queued=generator_pb2.Queued(position=position))
            case generation.Started():
                in_force = _settings_to_proto(settings)
                return answer(started=generator_pb2.Started(seeds=settings.seeds, settings=in_force))
            case generation.Progress(index, step, steps):
                return answer(progress=generator_pb2.Progress(index=index, step=step, steps=steps))
            case generation.Preview(index, step, data):
                return answer(preview=generator_pb2.Preview(index=index, step=step, data=data, format=format))
            case generation.Image(index, seed, file, cached):
                image = generator_pb2.Image(index=index, seed=seed, format=format, cached=cached, **file._asdict())
                return answer(image=image)
            case generation.Finished(cost):
                return answer(finished=generator_pb2.Finished(execution=execution(self._revision, *cost)))


def _asked_settings(settings: generator_pb2.GenerationSettings) -> AskedSettings:
    if settings.scheduler and settings.scheduler not in _SCHEDULER_NAMES:
        raise InvalidField("settings.scheduler", f"{int(settings.scheduler)} is no Scheduler of the contract")
    if settings.format and settings.format not in _FORMAT_NAMES:
        raise InvalidField("settings.format", f"{int(settings.format)} is no ImageFormat of the contract")
    return AskedSettings(
        width=settings.width,
        height=settings.height,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale if settings.HasField("guidance_scale") else None,
        seeds=tuple(settings.seeds),
        scheduler=_SCHEDULER_NAMES.get(settings.scheduler),
        format=_FORMAT_NAMES.get(settings.format, "png"),
        quality=settings.quality,
    )


def _asked_start(start: generator_pb2.GenerationStart) -> AskedStart:
    return AskedStart(
        image=start.image if start.HasField("image") else None,
        noise_id=start.noise_id if start.HasField("noise_id") else None,
        strength=start.strength if start.HasField("strength") else None,
    )


def _settings_to_proto(settings: GenerationSettings) -> generator_pb2.GenerationSettings:
    return generator_pb2.GenerationSettings(
        width=settings.width,
        height=settings.height,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        seeds=settings.seeds,
        scheduler=SCHEDULERS[settings.scheduler],
        format=FORMATS[settings.format],
        quality=settings.quality,
    )
