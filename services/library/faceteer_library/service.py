"""Wires the library service together from what a process shares."""

from __future__ import annotations

import asyncio

import grpc.aio
from faceteer.v1 import library_pb2_grpc
from faceteer_runtime.bundle import BundleError
from faceteer_runtime.service import Resources, Service

from faceteer_library.access import AccessPolicy
from faceteer_library.application import Library
from faceteer_library.person_labels import PersonLabels
from faceteer_library.servicer import LibraryServicer
from faceteer_library.settings import LibrarySettings
from faceteer_library.store import Store

NAME = "faceteer.v1.LibraryService"


def build(resources: Resources) -> Service:
    """Opens the bundle's library and makes its service.

    Raises:
        BundleError: the bundle has no library, or one of another SAE.
    """
    settings = LibrarySettings.from_other(resources.settings)
    part = resources.bundle.part("library")
    # Outside the part's directory: sealing and verifying the bundle do not see people's labels.
    labels = PersonLabels(settings.library_labels_path or resources.bundle.directory / "labels.sqlite")
    store = Store(part.path / "library.sqlite", labels.path)
    if resources.bundle.has_part("sae"):
        sae = resources.bundle.part("sae").revision
        if store.meta.get("sae_revision") != sae:
            raise BundleError(
                f"{part.path}: the library was made for SAE revision {store.meta.get('sae_revision')}, but the bundle "
                f"has {sae}; build the library again"
            )
    library = Library(store, labels, AccessPolicy(settings.gated_classes, settings.access_keys))
    servicer = LibraryServicer(library, revision=part.revision, bundle=resources.bundle.name)

    def register(server: grpc.aio.Server) -> None:
        library_pb2_grpc.add_LibraryServiceServicer_to_server(servicer, server)

    async def warm_up() -> None:
        await asyncio.to_thread(store.warm_up)

    return Service(NAME, register, warm_up)
