"""Settings of the studio: where the other four services are. The all-in-one process ignores the addresses."""

from __future__ import annotations

from typing import ClassVar

from faceteer_runtime.settings import ServiceSettings
from pydantic import Field


class StudioSettings(ServiceSettings):
    """The front door's own settings; it opens no bundle: the services it calls do."""

    needs_bundle: ClassVar[bool] = False

    listen: str = Field("127.0.0.1:50050", description="Address and port to serve on; port 0 picks a free one.")
    studio_encoder_address: str = Field("localhost:50051", description="Where EncoderService is.")
    studio_sae_address: str = Field("localhost:50052", description="Where SaeService is.")
    studio_generator_address: str = Field("localhost:50053", description="Where GeneratorService is.")
    studio_library_address: str = Field("localhost:50054", description="Where LibraryService is.")
    studio_wait_seconds: float = Field(
        60.0,
        gt=0,
        description="How long a starting front door waits for the others before it serves without those that are down.",
    )


class AllInOneSettings(StudioSettings):
    """The same for a process that holds every service, and so the bundle too."""

    needs_bundle: ClassVar[bool] = True
