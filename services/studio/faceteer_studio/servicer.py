"""StudioService over gRPC: hands each call to its job, with the time that is left.

Knows nothing of how the jobs are done.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from faceteer.v1 import library_pb2, studio_pb2, studio_pb2_grpc
from faceteer_runtime.cache import Cache
from faceteer_runtime.request import request_context

from faceteer_studio.edit_image import edit_image
from faceteer_studio.identity import Identity
from faceteer_studio.inputs import Inputs
from faceteer_studio.names import Names
from faceteer_studio.open_image import open_image
from faceteer_studio.transfer import transfer_features
from faceteer_studio.upstreams import Upstreams


class StudioServicer(studio_pb2_grpc.StudioServiceServicer):
    """See protos/faceteer/v1/studio.proto."""

    def __init__(self, upstreams: Upstreams, cache: Cache) -> None:
        self._upstreams = upstreams
        self._inputs = Inputs(upstreams, cache)
        self._names = Names(upstreams.library)
        self._identity = Identity(upstreams)

    async def GetStudio(self, request: studio_pb2.GetStudioRequest, context: Any) -> studio_pb2.GetStudioResponse:
        answer = await self._identity.get(context.time_remaining())
        if request_context().access_key:
            # The shared answer shows what everybody may see.
            shared, answer = answer, studio_pb2.GetStudioResponse()
            answer.CopyFrom(shared)
            library = await self._upstreams.library.call(
                "GetLibrary", library_pb2.GetLibraryRequest(), context.time_remaining()
            )
            answer.library.CopyFrom(library)
        return answer

    async def OpenImage(self, request: studio_pb2.OpenImageRequest, context: Any) -> studio_pb2.OpenImageResponse:
        return await open_image(
            request, self._upstreams, self._inputs, self._names, self._identity, context.time_remaining()
        )

    async def EditImage(
        self, request: studio_pb2.EditImageRequest, context: Any
    ) -> AsyncIterator[studio_pb2.EditImageResponse]:
        events = edit_image(request, self._upstreams, self._inputs, self._names, self._identity, context.time_remaining)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    async def TransferFeatures(
        self, request: studio_pb2.TransferFeaturesRequest, context: Any
    ) -> studio_pb2.TransferFeaturesResponse:
        return await transfer_features(
            request, self._upstreams, self._inputs, self._names, self._identity, context.time_remaining
        )
