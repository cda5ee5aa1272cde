"""Wires the encoder service together from what a process shares.

It may be served alone, or with others in one process.
"""

from __future__ import annotations

import asyncio

import grpc.aio
import numpy as np
import torch
from faceteer.v1 import encoder_pb2, encoder_pb2_grpc
from faceteer_runtime.batching import ModelWorker
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.service import Resources, Service

from faceteer_encoder.application import EncoderApplication
from faceteer_encoder.model import load_encoder
from faceteer_encoder.onnx_engine import DEFAULT_PATH, OnnxVisual
from faceteer_encoder.servicer import EncoderServicer
from faceteer_encoder.settings import EncoderSettings

NAME = "faceteer.v1.EncoderService"


def build(resources: Resources) -> Service:
    """Loads the bundle's encoder and makes its service.

    Raises:
        BundleError: the bundle has no encoder, or one that cannot be used.
    """
    settings = EncoderSettings.from_other(resources.settings)
    torch.set_num_threads(settings.threads)
    part = resources.bundle.part("encoder")
    encoder, preprocessor = load_encoder(
        part.path,
        device=settings.device,
        dtype=settings.encoder_dtype,
        max_image_bytes=settings.encoder_max_image_bytes,
        max_image_pixels=settings.encoder_max_image_pixels,
    )
    promised = part.facts.get("embed_dim", encoder.embed_dim)
    if promised != encoder.embed_dim:
        raise BundleError(f"{part.path}: embed_dim is {encoder.embed_dim}, but bundle.json says {promised}")
    if settings.encoder_engine == "onnx":
        path = settings.encoder_onnx_path or resources.bundle.directory / DEFAULT_PATH
        encoder.use_onnx(
            OnnxVisual(path, encoder_revision=part.revision, device=settings.device, threads=settings.threads)
        )
    worker = ModelWorker("encoder")
    application = EncoderApplication(
        encoder,
        preprocessor,
        part.revision,
        cache=resources.cache,
        worker=worker,
        metrics=resources.metrics,
        settings=settings,
    )
    card = encoder_pb2.GetEncoderResponse(
        revision=part.revision,
        bundle=resources.bundle.name,
        embed_dim=encoder.embed_dim,
        image_size=preprocessor.size[0],
        context_length=encoder.context_length,
        has_text_tower=encoder.has_text_tower,
        max_batch=settings.encoder_max_batch,
        max_image_bytes=settings.encoder_max_image_bytes,
        max_image_pixels=settings.encoder_max_image_pixels,
    )
    # Enough that the next batch is decoded while the model works on one.
    servicer = EncoderServicer(application, card, stream_window=2 * settings.encoder_model_batch)

    def register(server: grpc.aio.Server) -> None:
        encoder_pb2_grpc.add_EncoderServiceServicer_to_server(servicer, server)

    async def warm_up() -> None:
        # The example: a mean-grey picture, whose embedding is also Kandinsky's negative.
        await worker.run(torch.set_num_threads, settings.threads)
        await worker.run(encoder.encode_images, [np.full((*preprocessor.size, 3), 127, np.uint8)])
        if encoder.has_text_tower:
            await worker.run(encoder.encode_texts, ["a picture"])

    async def close() -> None:
        await application.close()
        await asyncio.to_thread(worker.close)

    return Service(NAME, register, warm_up, close)
