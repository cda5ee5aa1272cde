"""Settings of the gateway: where it listens, whom it calls, what it lets in."""

from __future__ import annotations

from typing import ClassVar

from faceteer_runtime.settings import ServiceSettings, split_address
from pydantic import Field, field_validator


class GatewaySettings(ServiceSettings):
    """Settings of ``python -m faceteer_gateway``; the all-in-one process reads them too."""

    needs_bundle: ClassVar[bool] = False

    listen: str = Field(
        "127.0.0.1:50055", description="Address and port of gRPC health, all that this process serves by gRPC."
    )
    gateway_listen: str = Field(
        "127.0.0.1:8080",
        description="Address and port of the HTTP server; port 0 picks a free one, and none serves no HTTP.",
    )
    gateway_studio_address: str = Field(
        "localhost:50050", description="Where the studio is. The all-in-one process calls itself instead."
    )
    gateway_hosts: str = Field(
        "localhost",
        description="Names under which browsers may reach the HTTP server, separated by commas; * for every name. IP "
        "addresses are always answered.",
    )
    gateway_origins: str | None = Field(
        None,
        description="Other sites whose pages may call the HTTP server, separated by commas, such as "
        "https://example.org.",
    )
    gateway_max_header_bytes: int = Field(32 << 10, ge=1024, description="Most bytes in a request's headers.")
    gateway_max_connections: int = Field(
        1000, ge=1, description="Most connections at once; a request on one more gets status 503."
    )
    gateway_header_timeout_s: float = Field(
        10.0, gt=0, description="Seconds within which a request's headers must have arrived."
    )
    gateway_stall_timeout_s: float = Field(
        60.0,
        gt=0,
        description="Seconds without a byte of a request's body arriving, or of an answer being taken, after which the "
        "connection is closed.",
    )

    @field_validator("gateway_listen")
    @classmethod
    def _is_address_or_none(cls, value: str) -> str:
        if value != "none":
            split_address(value)
        return value

    @property
    def hosts(self) -> frozenset[str]:
        """The names of ``gateway_hosts``, in lower case."""
        return frozenset(_listed(self.gateway_hosts.lower()))

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins of ``gateway_origins``."""
        return tuple(origin.rstrip("/") for origin in _listed(self.gateway_origins or ""))


def _listed(text: str) -> list[str]:
    return [name for each in text.split(",") if (name := each.strip())]
