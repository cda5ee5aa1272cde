"""Settings of the library service, beside those that all services share.

Knows nothing of other services.
"""

from __future__ import annotations

from pathlib import Path

from faceteer_runtime.settings import ServiceSettings
from pydantic import Field


class LibrarySettings(ServiceSettings):
    """Where people's labels are kept."""

    library_labels_path: Path | None = Field(
        None, description="File for people's labels, made at the first one; labels.sqlite in the bundle by default."
    )
