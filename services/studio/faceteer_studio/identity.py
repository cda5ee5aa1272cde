"""Which models the upstreams run, as one answer; asked for again when it is a few seconds old.

Knows nothing of jobs.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import time

from faceteer.v1 import encoder_pb2, execution_pb2, generator_pb2, library_pb2, sae_pb2, studio_pb2
from faceteer_runtime.errors import RevisionMismatch
from faceteer_runtime.request import enter_request, request_context

from faceteer_studio.upstreams import Upstreams

_FRESH_S = 5.0


class Identity:
    """GetStudio's answer, shared by all calls for a few seconds: an upstream may restart with another bundle."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams
        self._answer: studio_pb2.GetStudioResponse | None = None
        self._asked = 0.0

    async def get(self, timeout: float | None) -> studio_pb2.GetStudioResponse:
        """What the upstreams run. Do not change the answer."""
        if self._answer is None or time.monotonic() - self._asked > _FRESH_S:
            self._answer = await self._ask(timeout)
            self._asked = time.monotonic()
        return self._answer

    async def check(self, expected: execution_pb2.Revisions, timeout: float | None) -> execution_pb2.Revisions:
        """The revisions that run.

        Raises:
            RevisionMismatch: ``expected`` names another for encoder, SAE or generator.
        """
        actual = (await self.get(timeout)).revisions
        for part in ("encoder", "sae", "generator"):
            wanted = getattr(expected, part)
            if wanted and wanted != getattr(actual, part):
                raise RevisionMismatch(part, wanted, getattr(actual, part))
        return actual

    async def _ask(self, timeout: float | None) -> studio_pb2.GetStudioResponse:
        up = self._upstreams
        # Tasks of their own.
        encoder, sae, generator, library = await asyncio.gather(
            up.encoder.call("GetEncoder", encoder_pb2.GetEncoderRequest(), timeout),
            up.sae.call("GetSae", sae_pb2.GetSaeRequest(), timeout),
            up.generator.call("GetGenerator", generator_pb2.GetGeneratorRequest(), timeout),
            self._library(timeout),
        )
        return studio_pb2.GetStudioResponse(
            bundle=encoder.bundle,
            version=importlib.metadata.version("faceteer-studio"),
            revisions=execution_pb2.Revisions(
                encoder=encoder.revision,
                sae=sae.revision,
                generator=generator.revision,
                library=library.revision,
            ),
            encoder=encoder,
            sae=sae,
            generator=generator,
            library=library,
        )

    async def _library(self, timeout: float | None) -> library_pb2.GetLibraryResponse:
        """As a caller without an access key sees it, since the answer is shared; to be run in a task of its own."""
        request = request_context()
        enter_request(request.request_id, request.method)
        answer: library_pb2.GetLibraryResponse = await self._upstreams.library.call(
            "GetLibrary", library_pb2.GetLibraryRequest(), timeout
        )
        return answer
