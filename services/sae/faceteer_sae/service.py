"""Wires the SAE service together from what a process shares.

It may be served alone, or with others in one process.
"""

from __future__ import annotations

import asyncio

import grpc.aio
import torch
from faceteer.v1 import sae_pb2, sae_pb2_grpc
from faceteer_runtime.batching import ModelWorker
from faceteer_runtime.service import Resources, Service

from faceteer_sae.application import SaeApplication
from faceteer_sae.features import Origin, encode
from faceteer_sae.model import SparseAutoencoder
from faceteer_sae.servicer import SaeServicer
from faceteer_sae.settings import SaeSettings
from faceteer_sae.statistics import load_statistics

NAME = "faceteer.v1.SaeService"


def build(resources: Resources) -> Service:
    """Loads the bundle's SAE and makes its service.

    Raises:
        BundleError: the bundle has no SAE, or one that cannot be used.
    """
    settings = SaeSettings.from_other(resources.settings)
    torch.set_num_threads(settings.threads)
    part = resources.bundle.part("sae")
    sae = SparseAutoencoder.load(part.path, settings.device, settings.sae_screening)
    statistics = load_statistics(part.path, sae.d_in, sae.d_sae)
    worker = ModelWorker("sae")
    encoder_revision = str(part.facts.get("encoder_revision", ""))
    application = SaeApplication(
        sae,
        statistics,
        revision=part.revision,
        encoder_revision=encoder_revision,
        cache=resources.cache,
        worker=worker,
        metrics=resources.metrics,
        settings=settings,
        origin=Origin(resources.bundle.name, resources.bundle.example),
    )
    card = sae_pb2.GetSaeResponse(
        revision=part.revision,
        bundle=resources.bundle.name,
        encoder_revision=encoder_revision,
        architecture=sae.architecture,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        k=sae.k,
        has_statistics=statistics is not None,
        max_batch=settings.sae_max_batch,
        max_edits=settings.sae_max_edits,
    )
    servicer = SaeServicer(application, card)

    def register(server: grpc.aio.Server) -> None:
        sae_pb2_grpc.add_SaeServiceServicer_to_server(servicer, server)

    async def warm_up() -> None:
        # The example: the training corpus' middle, as far as the SAE knows it.
        await worker.run(torch.set_num_threads, settings.threads)
        await worker.run(encode, sae, statistics, [sae.b_dec])

    async def close() -> None:
        application.close()
        await asyncio.to_thread(worker.close)

    return Service(NAME, register, warm_up, close)
