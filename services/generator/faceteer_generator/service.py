"""Wires the generator: bundle to decoder to engine to application to servicer."""

from __future__ import annotations

import asyncio

import grpc.aio
import numpy as np
import torch
from faceteer.v1 import generator_pb2_grpc
from faceteer_runtime.batching import ModelWorker
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.service import Resources, Service

from faceteer_generator.application import GeneratorApplication, Identity
from faceteer_generator.decoder import Decoder
from faceteer_generator.denoise import Denoiser
from faceteer_generator.engine import Engine
from faceteer_generator.inversion import INVERTIBLE
from faceteer_generator.kandinsky import KandinskyDecoder
from faceteer_generator.model import load_decoder
from faceteer_generator.prior import DIRECTORY as PRIOR_DIRECTORY
from faceteer_generator.prior import TextPrior, inspect_prior, load_prior
from faceteer_generator.requests import LCM_MAX_STEPS, AskedSettings, Limits
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
    prior_directory = part.path / PRIOR_DIRECTORY
    has_prior = prior_directory.is_dir()
    if has_prior:
        inspect_prior(prior_directory)

    def load_fitting_prior() -> TextPrior:
        prior = load_prior(prior_directory, device=decoder.device, dtype=decoder.dtype)
        if prior.embed_dim != decoder.embed_dim:
            raise BundleError(
                f"{prior_directory}: imagines {prior.embed_dim} dimensions, the decoder takes {decoder.embed_dim}"
            )
        return prior

    worker = ModelWorker("generator")
    denoiser = Denoiser(decoder)
    engine = Engine(
        denoiser,
        worker,
        resources.cache,
        max_batch=settings.generator_max_batch,
        max_queue=settings.generator_max_queue,
        metrics=resources.metrics,
    )
    identity = Identity(
        bundle=resources.bundle.name,
        kind=decoder.kind,
        revision=part.revision,
        encoder_revision=str(part.facts.get("encoder_revision", "")),
        embed_dim=decoder.embed_dim,
        precision=decoder.precision,
        max_batch=settings.generator_max_batch,
        reads_images=decoder.prediction_type in INVERTIBLE,
    )
    application = GeneratorApplication(
        identity,
        limits,
        engine,
        denoiser,
        resources.cache,
        load_prior=load_fitting_prior if has_prior else None,
        max_image_bytes=settings.generator_max_image_bytes,
        max_image_pixels=settings.generator_max_image_pixels,
    )

    async def warm_up() -> None:
        """An image in a few steps, past queue and cache: the weights are paged in and the kernels chosen."""
        asked = AskedSettings(steps=min(_WARM_UP_STEPS, limits.max_steps, LCM_MAX_STEPS), seeds=(0,))
        (spec,) = limits.settle(asked).images(np.zeros(decoder.embed_dim, dtype=np.float32), None)
        image = await worker.run(denoiser.begin, spec)
        while not image.done and image.error is None:
            await worker.run(denoiser.step, [image])
        if image.error is not None:
            raise BundleError(f"{part.path}: the decoder cannot draw ({image.error})")
        await worker.run(denoiser.decode, [image.latents])

    def register(server: grpc.aio.Server) -> None:
        generator_pb2_grpc.add_GeneratorServiceServicer_to_server(GeneratorServicer(application), server)

    async def close() -> None:
        await engine.close()
        # Waits for the call that runs.
        await asyncio.to_thread(worker.close)

    return Service(NAME, register, warm_up, close)


def _check_fit(limits: Limits, decoder: Decoder, embed_dim: int | None) -> None:
    for width, height in limits.sizes:
        if width % decoder.size_multiple or height % decoder.size_multiple:
            raise BundleError(f"generator: size {width} x {height} is no multiple of {decoder.size_multiple}")
    if limits.size_multiple % decoder.size_multiple:
        raise BundleError(f"generator: size_multiple {limits.size_multiple} is no multiple of {decoder.size_multiple}")
    if embed_dim is not None and embed_dim != decoder.embed_dim:
        raise BundleError(f"generator: bundle.json says {embed_dim} dimensions, the unet {decoder.embed_dim}")
