"""Wires the generator: bundle to decoder to engine to servicer.

Knows nothing of the process around it; ``python -m faceteer_generator`` and the all-in-one process both call it.
"""

from __future__ import annotations

import grpc.aio
import numpy as np
import torch
from faceteer.v1 import generator_pb2_grpc
from faceteer_runtime.batching import ModelWorker
from faceteer_runtime.bundle import BundleError, BundlePart
from faceteer_runtime.service import Resources, Service

from faceteer_generator.decoder import Decoder
from faceteer_generator.denoise import Denoiser
from faceteer_generator.engine import Engine
from faceteer_generator.inversion import INVERTIBLE
from faceteer_generator.inverter import Inverter
from faceteer_generator.kandinsky import KandinskyDecoder
from faceteer_generator.model import load_decoder
from faceteer_generator.prior import DIRECTORY as PRIOR_DIRECTORY
from faceteer_generator.prior import Imagining, TextPrior, inspect_prior, load_prior
from faceteer_generator.prompts import Prompt, Prompts
from faceteer_generator.requests import LCM_MAX_STEPS, Limits
from faceteer_generator.servicer import GeneratorServicer
from faceteer_generator.settings import GeneratorSettings

NAME = "faceteer.v1.GeneratorService"
_WARM_UP_STEPS = 2


def build(resources: Resources) -> Service:
    """The service on ``resources.bundle``; loads the models, which blocks.

    Raises:
        BundleError: the bundle has no generator, or one that cannot be used.
    """
    settings = GeneratorSettings.from_other(resources.settings)
    part = resources.bundle.part("generator")
    torch.set_num_threads(settings.threads)
    decoder = load_decoder(
        part.path,
        kind=str(part.facts.get("kind", KandinskyDecoder.kind)),
        device=settings.device,
        dtype=settings.generator_dtype,
        compile=settings.generator_compile,
        offload=settings.generator_offload,
    )
    limits = Limits.of_bundle(
        part,
        max_steps=min(settings.generator_max_steps, decoder.train_timesteps),
        max_seeds=min(settings.generator_max_seeds, settings.generator_max_batch + settings.generator_max_queue),
    )
    _check_fit(limits, decoder, part.facts.get("embed_dim"))
    worker = ModelWorker("generator")
    denoiser = Denoiser(decoder)
    engine = Engine(
        denoiser,
        worker,
        resources.cache,
        revision=part.revision,
        precision=decoder.precision,
        max_batch=settings.generator_max_batch,
        max_queue=settings.generator_max_queue,
        metrics=resources.metrics,
    )
    inverter = None
    if decoder.prediction_type in INVERTIBLE:
        inverter = Inverter(
            denoiser,
            worker,
            resources.cache,
            revision=part.revision,
            precision=decoder.precision,
            max_active=settings.generator_max_batch,
        )
    encoder_revision = str(part.facts.get("encoder_revision", ""))
    servicer = GeneratorServicer(
        engine,
        inverter,
        _prompts(resources, part, decoder, worker, encoder_revision, settings.generator_max_batch),
        limits,
        resources.cache,
        bundle=resources.bundle.name,
        kind=decoder.kind,
        encoder_revision=encoder_revision,
        embed_dim=decoder.embed_dim,
        max_image_bytes=settings.generator_max_image_bytes,
        max_image_pixels=settings.generator_max_image_pixels,
    )

    async def warm_up() -> None:
        """A picture in a few steps, past queue and cache: the weights are paged in and the kernels chosen."""
        generation = limits.settle(steps=min(_WARM_UP_STEPS, limits.max_steps, LCM_MAX_STEPS), seeds=(0,))
        (drawing,) = generation.drawings(np.zeros(decoder.embed_dim, dtype=np.float32), None)
        picture = await worker.run(denoiser.begin, drawing)
        while not picture.done and picture.error is None:
            await worker.run(denoiser.step, [picture])
        if picture.error is not None:
            raise BundleError(f"{part.path}: the decoder cannot draw ({picture.error})")
        await worker.run(denoiser.decode, [picture.latents])

    def register(server: grpc.aio.Server) -> None:
        generator_pb2_grpc.add_GeneratorServiceServicer_to_server(servicer, server)

    return Service(NAME, register, warm_up, engine.close)


def _prompts(
    resources: Resources, part: BundlePart, decoder: Decoder, worker: ModelWorker, encoder_revision: str, most: int
) -> Prompts | None:
    """The bundle's prior, checked now and loaded at the first prompt; None where there is none."""
    directory = part.path / PRIOR_DIRECTORY
    if not directory.is_dir():
        return None
    inspect_prior(directory)

    def load() -> TextPrior:
        prior = load_prior(directory, device=decoder.device, dtype=decoder.dtype)
        if prior.embed_dim != decoder.embed_dim:
            raise BundleError(
                f"{directory}: imagines {prior.embed_dim} dimensions, the decoder takes {decoder.embed_dim}"
            )
        return prior

    def begin(prior: TextPrior, prompt: Prompt) -> Imagining:
        return Imagining(prior, prompt.text, prompt.negative, prompt.seed, prompt.steps, prompt.guidance_scale)

    return Prompts(
        load,
        begin,
        worker,
        resources.cache,
        revision=part.revision,
        encoder_revision=encoder_revision,
        precision=decoder.precision,
        max_active=most,
    )


def _check_fit(limits: Limits, decoder: Decoder, embed_dim: int | None) -> None:
    for width, height in limits.sizes:
        if width % decoder.size_multiple or height % decoder.size_multiple:
            raise BundleError(f"generator: size {width} x {height} is no multiple of {decoder.size_multiple}")
    if limits.size_multiple % decoder.size_multiple:
        raise BundleError(f"generator: size_multiple {limits.size_multiple} is no multiple of {decoder.size_multiple}")
    if embed_dim is not None and embed_dim != decoder.embed_dim:
        raise BundleError(f"generator: bundle.json says {embed_dim} dimensions, the unet {decoder.embed_dim}")
