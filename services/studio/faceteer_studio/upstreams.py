"""What the other four services run: remembered for a few seconds, each part separately.

A part that is gone costs callers one short wait at most: from then on it is asked in the background, and what it
last answered is used, since a revision or a limit rarely changes.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeAlias, TypeVar

from faceteer.v1 import encoder_pb2, execution_pb2, generator_pb2, library_pb2, sae_pb2, studio_pb2
from faceteer_runtime.errors import DeadlineExceeded, FaceteerError, RevisionMismatch, UpstreamUnavailable
from google.protobuf.message import Message

from faceteer_studio.ports import Call

_log = logging.getLogger(__name__)
A = TypeVar("A", bound=Message)

# For how long an answer counts as fresh; any service may restart with another bundle.
FRESH_S = 5.0
# The same for a status call, and for a part that is down.
FRESH_STATUS_S = 0.5
FRESH_FAILURE_S = 1.0
# These calls run no model: if one takes longer, the service hangs.
ASK_S = 2.0


class Part(Generic[A]):
    """One service's description of itself.

    Attributes:
        name: "encoder", "sae", "generator" or "library".
        answer: its last answer; an empty message until there is one. Shared: do not change it.
        error: why it does not answer now; None when it does.
    """

    def __init__(self, name: str, ask: Callable[[Call], Awaitable[A]], nothing: A) -> None:
        self.name = name
        self.answer = nothing
        self.error: FaceteerError | None = None
        self._ask = ask
        self._known = False
        self._asked = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def get(self, call: Call) -> A:
        """Its answer, a few seconds old at most while the service is up.

        Raises:
            FaceteerError: it has never answered.
        """
        await self.refresh(call)
        if not self._known:
            raise self.error or DeadlineExceeded(self.name)
        return self.answer

    async def latest(self, call: Call) -> A:
        """The same, but an empty message where it has never answered."""
        await self.refresh(call)
        return self.answer

    async def refresh(self, call: Call, *, fresh_s: float = FRESH_S, patient: bool = False) -> None:
        """Asks again when the answer is older than ``fresh_s``; all who ask meanwhile wait for the same answer.

        A part that was down is only waited for by the ``patient``. Nobody waits longer than their own deadline.
        """
        down = self.error is not None
        if time.monotonic() - self._asked <= (min(fresh_s, FRESH_FAILURE_S) if down else fresh_s):
            return
        if self._asking is None or self._asking.done():
            # In a separate task: all callers share the answer, so the first one's leaving or deadline must not end it.
            self._asking = asyncio.ensure_future(self._refresh(call.on_our_own(ASK_S)))
        if not down or patient:
            done, _ = await asyncio.wait({self._asking}, timeout=call.time_remaining())
            for task in done:
                task.result()

    def close(self) -> None:
        """Stops asking."""
        if self._asking is not None:
            self._asking.cancel()

    async def _refresh(self, call: Call) -> None:
        try:
            self.answer, error = await self._ask(call), None
            self._known = True
        except FaceteerError as failure:
            hangs = f"does not answer within {ASK_S:g} s"
            error = UpstreamUnavailable(self.name, hangs, 1.0) if failure.status == "DEADLINE_EXCEEDED" else failure
            if self.error is None:
                _log.warning("%s is down: %s", self.name, error)
        if error is None and self.error is not None:
            _log.info("%s is up again", self.name)
        self.error = error
        self._asked = time.monotonic()


Encoder: TypeAlias = Part[encoder_pb2.GetEncoderResponse]
Sae: TypeAlias = Part[sae_pb2.GetSaeResponse]
Generator: TypeAlias = Part[generator_pb2.GetGeneratorResponse]
Library: TypeAlias = Part[library_pb2.GetLibraryResponse]


class Upstreams:
    """The four parts."""

    def __init__(self) -> None:
        encoder, sae, generator, library = encoder_pb2, sae_pb2, generator_pb2, library_pb2
        self.encoder = Part(
            "encoder",
            lambda call: call.ports.encoder.get_encoder(encoder.GetEncoderRequest(), call),
            encoder.GetEncoderResponse(),
        )
        self.sae = Part("sae", lambda call: call.ports.sae.get_sae(sae.GetSaeRequest(), call), sae.GetSaeResponse())
        self.generator = Part(
            "generator",
            lambda call: call.ports.generator.get_generator(generator.GetGeneratorRequest(), call),
            generator.GetGeneratorResponse(),
        )
        self.library = Part(
            "library",
            lambda call: call.ports.library.get_library(library.GetLibraryRequest(), call),
            library.GetLibraryResponse(),
        )

    @property
    def parts(self) -> tuple[Encoder, Sae, Generator, Library]:
        """In the order of the flow."""
        return self.encoder, self.sae, self.generator, self.library

    async def describe(self, call: Call) -> studio_pb2.GetStudioResponse:
        """All of them as they are now. Never fails: a part that is down is reported as down."""
        await asyncio.gather(*(part.refresh(call, fresh_s=FRESH_STATUS_S, patient=True) for part in self.parts))
        encoder, sae = self.encoder.answer, self.sae.answer
        generator, library = self.generator.answer, self.library.answer
        return studio_pb2.GetStudioResponse(
            bundle=encoder.bundle or sae.bundle or generator.bundle or library.bundle,
            version=importlib.metadata.version("faceteer-studio"),
            revisions=execution_pb2.Revisions(
                encoder=encoder.revision, sae=sae.revision, generator=generator.revision, library=library.revision
            ),
            encoder=encoder,
            sae=sae,
            generator=generator,
            library=library,
            parts=[
                studio_pb2.PartStatus(
                    name=part.name,
                    state=studio_pb2.PART_STATE_UP if part.error is None else studio_pb2.PART_STATE_DOWN,
                    reason="" if part.error is None else part.error.message,
                )
                for part in self.parts
            ],
        )

    async def check_revisions(self, expected: execution_pb2.Revisions, call: Call, *, draws: bool) -> None:
        """Raises RevisionMismatch where a part runs another model than expected, and what a part that runs fails with.

        A generator that is down does not keep anybody from a report.
        """
        for part in (self.encoder, self.sae, self.generator):
            wanted = getattr(expected, part.name)
            if not wanted:
                continue
            needed = draws or part is not self.generator
            answer = await (part.get(call) if needed else part.latest(call))
            actual = answer.revision
            if wanted != actual and (needed or actual):
                raise RevisionMismatch(part.name, wanted, actual)

    def close(self) -> None:
        """Stops asking."""
        for part in self.parts:
            part.close()
