"""What a server runs, its limits, and whether its services are healthy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from faceteer._models.features import LibraryFacts
from faceteer._models.shown import Shown
from faceteer._models.values import Revisions, Settings
from faceteer._models.wire import copied, word
from faceteer.v1 import generator_pb2, studio_pb2

#: grpc.health.v1's answers by number.
HEALTH = {1: "serving", 2: "not serving", 3: "unknown"}
SERVICES = ("encoder", "sae", "generator", "library", "studio")
#: What people do, and the services that it takes.
JOBS = {
    "opening pictures": {"encoder", "sae", "library"},
    "reports of edits": {"sae", "library"},
    "drawing": {"sae", "generator", "library"},
    "encoding": {"encoder"},
    "the library": {"library"},
}


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


@dataclass(frozen=True, repr=False)
class ServerStatus(Shown):
    """What answers at an address.

    Attributes:
        address: where.
        bundle: the models' name.
        version: the server's own.
        revisions: all parts'.
        health: "serving", "not serving" or "unknown", by service ("encoder", "sae", "generator", "library", "studio").
        down: why a service does not answer, by service; empty when all of them do. What is said of such a service
            (its revision, its limits) is the last that the server knew, and empty when it never knew.
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
    down: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_proto(
        cls, message: studio_pb2.GetStudioResponse, *, address: str, health: dict[str, str], round_trip: float
    ) -> ServerStatus:
        """From the wire, with the facts that came with it."""
        generator = message.generator
        return cls(
            address=address,
            bundle=message.bundle,
            version=message.version,
            revisions=Revisions.from_proto(message.revisions),
            encoder=copied(EncoderFacts, message.encoder),
            sae=copied(SaeFacts, message.sae),
            generator=copied(
                GeneratorFacts,
                generator,
                sizes=tuple((size.width, size.height) for size in generator.sizes),
                defaults=Settings.from_proto(generator.defaults),
                schedulers=tuple(word(generator_pb2.Scheduler, number) for number in generator.schedulers),
            ),
            health=health,
            round_trip=round_trip,
            library=LibraryFacts.from_proto(message.library),
            down={part.name: part.reason for part in message.parts if part.state == studio_pb2.PART_STATE_DOWN},
        )

    @property
    def healthy(self) -> bool:
        """Whether every service serves."""
        return not self.down and all(state == "serving" for state in self.health.values())

    @property
    def works(self) -> tuple[str, ...]:
        """What can be done now, in words; all of it when every service answers."""
        return tuple(job for job, needs in JOBS.items() if not needs & self.down.keys())

    @property
    def fails(self) -> tuple[str, ...]:
        """What cannot be done now, because it needs a service that is down."""
        return tuple(job for job, needs in JOBS.items() if needs & self.down.keys())

    def title(self) -> str:
        """What answers, in one line."""
        version = f"version {self.version} · " if self.version else ""
        return f"bundle {self.bundle} · {version}{self.round_trip * 1000:.2g} ms away"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(service, state, revision, what it runs) of every service; nothing is said of one that was never reached."""
        encoder, sae, generator = self.encoder, self.sae, self.generator
        size = "x".join(map(str, generator.sizes[0])) if generator.sizes else "?"
        runs = {
            "encoder": f"{encoder.embed_dim}-d embeddings of {encoder.image_size} px"
            + ("" if encoder.has_text_tower else ", no text tower"),
            "sae": f"{sae.d_sae} features, {sae.architecture}" + (f", k = {sae.k}" if sae.k else ""),
            "generator": f"{size}, {generator.defaults.steps} steps, {', '.join(generator.schedulers)}",
            "library": f"{self.library.n_labelled:,} of {self.library.n_features:,} features labelled",
            "studio": f"up to {generator.max_seeds} pictures an edit, {sae.max_edits} edits",
        }
        rows = []
        for service, health in self.health.items():
            state = "down" if service in self.down else health
            revision = getattr(self.revisions, service, "")
            known = service not in self.down or bool(revision)
            rows.append((service, state, revision, runs[service] if known else ""))
        return rows

    def consequences(self) -> list[str]:
        """What services that are down mean for the caller; empty when none is."""
        if not self.down:
            return []
        return [f"does not work: {', '.join(self.fails)}", f"still works: {', '.join(self.works) or 'nothing'}"]

    def __repr__(self) -> str:
        ill = [f"{service} {state}" for service, state, _, _ in self.rows() if state != "serving"]
        return f"<{type(self).__name__} of {self.address}: {self.bundle}, {', '.join(ill) or 'all services serving'}>"

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
            "down": dict(self.down),
            "works": list(self.works),
            "fails": list(self.fails),
        }
