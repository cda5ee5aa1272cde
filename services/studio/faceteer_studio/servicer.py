"""StudioService over gRPC, and the methods of LibraryService that need the other services: each call to its job."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from faceteer.v1 import library_pb2, studio_pb2, studio_pb2_grpc

from faceteer_studio.application import Studio
from faceteer_studio.library_front import LibraryFront
from faceteer_studio.ports import Call, Ports


class StudioServicer(studio_pb2_grpc.StudioServiceServicer):
    """See protos/faceteer/v1/studio.proto."""

    def __init__(self, studio: Studio, ports: Ports) -> None:
        self._studio = studio
        self._ports = ports

    async def GetStudio(self, request: studio_pb2.GetStudioRequest, context: Any) -> studio_pb2.GetStudioResponse:
        return await self._studio.describe(Call.of(self._ports, context))

    async def OpenImage(self, request: studio_pb2.OpenImageRequest, context: Any) -> studio_pb2.OpenImageResponse:
        return await self._studio.open_image(request, Call.of(self._ports, context))

    async def EditImage(
        self, request: studio_pb2.EditImageRequest, context: Any
    ) -> AsyncIterator[studio_pb2.EditImageResponse]:
        async with contextlib.aclosing(self._studio.edit_image(request, Call.of(self._ports, context))) as events:
            async for event in events:
                yield event

    async def TransferFeatures(
        self, request: studio_pb2.TransferFeaturesRequest, context: Any
    ) -> studio_pb2.TransferFeaturesResponse:
        return await self._studio.transfer_features(request, Call.of(self._ports, context))


def library_handlers(front: LibraryFront, ports: Ports) -> dict[str, Any]:
    """gRPC handlers by method name, which replace LibraryService's own."""

    async def search_features(request: library_pb2.SearchFeaturesRequest, context: Any) -> Any:
        return await front.search_features(request, Call.of(ports, context))

    async def get_feature_icon(request: library_pb2.GetFeatureIconRequest, context: Any) -> Any:
        return await front.get_feature_icon(request, Call.of(ports, context))

    return {
        "SearchFeatures": grpc.unary_unary_rpc_method_handler(
            search_features,
            request_deserializer=library_pb2.SearchFeaturesRequest.FromString,
            response_serializer=library_pb2.SearchFeaturesResponse.SerializeToString,
        ),
        "GetFeatureIcon": grpc.unary_unary_rpc_method_handler(
            get_feature_icon,
            request_deserializer=library_pb2.GetFeatureIconRequest.FromString,
            response_serializer=library_pb2.GetFeatureIconResponse.SerializeToString,
        ),
    }
