"""Settings of the library service, beside those that all services share.

Knows nothing of other services.
"""

from __future__ import annotations

from pathlib import Path

from faceteer_runtime.settings import ServiceSettings
from pydantic import Field


class LibrarySettings(ServiceSettings):
    """Where people's labels are kept."""

    listen: str = Field("127.0.0.1:50054", description="Address and port to serve on; port 0 picks a free one.")
    library_labels_path: Path | None = Field(
        None, description="File for people's labels, made at the first one; labels.sqlite in the bundle by default."
    )
