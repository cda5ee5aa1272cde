"""Settings of the SAE service, beside those that all services share.

``sae_`` begins every name, so that one process can read all services' settings.
"""

from __future__ import annotations

from typing import Literal

from faceteer_runtime.settings import ServiceSettings
from pydantic import Field


class SaeSettings(ServiceSettings):
    """Limits of SaeService; GetSae publishes them."""

    listen: str = Field("127.0.0.1:50052", description="Address and port to serve on; port 0 picks a free one.")
    sae_max_batch: int = Field(
        256, ge=1, description="Most embeddings in one SAE call, and most encoded in one pass of the model."
    )
    sae_max_edits: int = Field(1000, ge=1, description="Most edits in one EditEmbeds call.")
    sae_screening: Literal["auto", "int8", "weights"] = Field(
        "auto",
        description="What a CPU reads to find the features that fire: an int8 copy of the encoder (half of float16's "
        "time; made in memory where the bundle holds none), the weights themselves, or int8 where the bundle holds it.",
    )
