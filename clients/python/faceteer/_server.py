"""What a server runs, its limits, and whether its services are well.

Knows nothing of how calls are made.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import wrappers_pb2

from faceteer._effects import Operation, Unary
from faceteer._errors import FaceteerError
from faceteer._facts import LibraryFacts
from faceteer._methods import GET_STUDIO, Method
from faceteer._opening import Context
from faceteer._retries import Attempts, call
from faceteer._values import Revisions, Settings
from faceteer.v1 import studio_pb2

# grpc.health.v1's messages are one string and one enum in field 1; the wrappers have the same bytes, and spare the SDK
# a dependency for two fields.
_HEALTH_CHECK: Method[wrappers_pb2.UInt32Value] = Method("/grpc.health.v1.Health/Check", wrappers_pb2.UInt32Value)
_HEALTH = {1: "serving", 2: "not serving", 3: "unknown"}
SERVICES = ("encoder", "sae", "generator", "library", "studio")


@dataclass(frozen=True)
class EncoderFacts:
    """The encoder: embedding length, picture size in pixels, and limits."""

    revision: str
    embed_dim: int
    image_size: int
    max_batch: int
    max_image_bytes: int
    max_image_pixels: int
    has_text_tower: bool


@dataclass(frozen=True)
class SaeFacts:
    """The sparse autoencoder: d_in, number of features, and limits."""

    revision: str
    architecture: str
    d_in: int
    d_sae: int
    k: int
    has_statistics: bool
    max_batch: int
    max_edits: int


@dataclass(frozen=True)
class GeneratorFacts:
    """The decoder: sizes (width, height; the first is the default), default settings, schedulers, and limits.

    Attributes:
        has_prior: whether :meth:`Client.embed_prompt` is served.
        kind: "kandinsky-2-2" or "sdxl-ip-adapter".
        reads_images: whether ``keep_layout`` is served.
        size_multiple: other sizes are served too when both sides are multiples of this; 0: only those listed.
        max_pixels: the most pixels of such a size.
    """

    revision: str
    sizes: tuple[tuple[int, int], ...]
    defaults: Settings
    schedulers: tuple[str, ...]
    max_steps: int
    max_seeds: int
    has_prior: bool
    kind: str = ""
    reads_images: bool = False
    size_multiple: int = 0
    max_pixels: int = 0


@dataclass(frozen=True)
class ServerStatus:
    """What answers at an address.

    Attributes:
        address: where.
        bundle: the models' name.
        version: the server's own.
        revisions: all parts'.
        health: "serving", "not serving" or "unknown", by service ("encoder", "sae", "generator", "library", "studio").
        round_trip: seconds that the last empty call took.
        library: what the library covers.
    """

    address: str
    bundle: str
    version: str
    revisions: Revisions
    encoder: EncoderFacts
    sae: SaeFacts
    generator: GeneratorFacts
    health: dict[str, str]
    round_trip: float
    library: LibraryFacts = field(default_factory=LibraryFacts)

    @property
    def healthy(self) -> bool:
        """Whether every service serves."""
        return all(state == "serving" for state in self.health.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        generator = dict(vars(self.generator))
        generator["sizes"] = [list(size) for size in self.generator.sizes]
        generator["schedulers"] = list(self.generator.schedulers)
        defaults = dict(vars(self.generator.defaults))
        defaults["size"] = list(self.generator.defaults.size or ()) or None
        defaults.pop("seeds")
        return {
            **vars(self),
            "revisions": dict(vars(self.revisions)),
            "encoder": dict(vars(self.encoder)),
            "sae": dict(vars(self.sae)),
            "generator": {**generator, "defaults": defaults},
            "health": dict(self.health),
            "library": self.library.to_dict(),
        }


def server_status(context: Context, *, timeout: float | None) -> Operation[ServerStatus]:
    """Asks the front door what it runs, and every service for its health."""
    attempts = context.attempts(timeout, context.timeouts.query)
    answer = yield from call(GET_STUDIO, studio_pb2.GetStudioRequest(), attempts)
    health = {}
    for service in SERVICES:
        health[service] = yield from _health(service, attempts)
    started = time.monotonic()
    yield from _health("studio", attempts)
    round_trip = time.monotonic() - started
    encoder, sae, generator = answer.encoder, answer.sae, answer.generator
    return ServerStatus(
        address=context.address,
        bundle=answer.bundle,
        version=answer.version,
        revisions=Revisions.from_proto(answer.revisions),
        encoder=EncoderFacts(
            encoder.revision,
            encoder.embed_dim,
            encoder.image_size,
            encoder.max_batch,
            encoder.max_image_bytes,
            encoder.max_image_pixels,
            encoder.has_text_tower,
        ),
        sae=SaeFacts(
            sae.revision,
            sae.architecture,
            sae.d_in,
            sae.d_sae,
            sae.k,
            sae.has_statistics,
            sae.max_batch,
            sae.max_edits,
        ),
        generator=GeneratorFacts(
            generator.revision,
            tuple((size.width, size.height) for size in generator.sizes),
            Settings.from_proto(generator.defaults),
            tuple(_scheduler(number) for number in generator.schedulers),
            generator.max_steps,
            generator.max_seeds,
            generator.has_prior,
            generator.kind,
            generator.reads_images,
            generator.size_multiple,
            generator.max_pixels,
        ),
        health=health,
        round_trip=round_trip,
        library=LibraryFacts.from_proto(answer.library),
    )


def _health(service: str, attempts: Attempts) -> Operation[str]:
    name = f"faceteer.v1.{service.capitalize()}Service"
    try:
        answer = yield Unary(_HEALTH_CHECK, wrappers_pb2.StringValue(value=name), attempts.remaining)
    except FaceteerError as error:
        if error.status in ("NOT_FOUND", "UNIMPLEMENTED"):
            return "unknown"
        raise
    return _HEALTH.get(answer.value, "unknown")


def _scheduler(number: Any) -> str:
    from faceteer.v1 import generator_pb2

    return generator_pb2.Scheduler.Name(number).removeprefix("SCHEDULER_").lower()
