"""Settings of the library service, beside those that all services share."""

from __future__ import annotations

from pathlib import Path

from faceteer_runtime.settings import ServiceSettings
from pydantic import Field, SecretStr


class LibrarySettings(ServiceSettings):
    """Where people's labels are kept, and who may see what is gated."""

    listen: str = Field("127.0.0.1:50054", description="Address and port to serve on; port 0 picks a free one.")
    library_labels_path: Path | None = Field(
        None, description="File for people's labels, made at the first one; labels.sqlite in the bundle by default."
    )
    library_gated_classes: str = Field(
        "*",
        description="Safety classes whose features only callers with an access key see, separated by commas; * for "
        "every class, none for no class.",
    )
    library_access_keys: SecretStr | None = Field(
        None,
        description="Secrets that open gated classes, separated by commas; callers send one as the metadata "
        "x-faceteer-access. Set it in the environment: flags are seen by all users of the machine.",
    )

    @property
    def gated_classes(self) -> tuple[str, ...]:
        """The classes, or ("*",)."""
        return () if self.library_gated_classes.strip() == "none" else _words(self.library_gated_classes)

    @property
    def access_keys(self) -> tuple[str, ...]:
        """The secrets."""
        return _words(self.library_access_keys.get_secret_value()) if self.library_access_keys else ()


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
