"""Where the server is and how to reach it: addresses, TLS, credentials, channel options.

Knows nothing of calls.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio

from faceteer._errors import InvalidArgumentError

DEFAULT_ADDRESS = "localhost:50050"
ADDRESS_VARIABLE = "FACETEER_ADDRESS"

_OPTIONS: list[tuple[str, Any]] = [
    # Pictures at full size are larger than gRPC's 4 MiB; the server's own limits bound what is sent.
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),
    ("grpc.max_send_message_length", -1),
    # A server that is just starting is found within its first seconds.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # In spite of its name: how long one attempt to connect may take. An address that swallows packets is given up
    # within the shortest default deadline.
    ("grpc.min_reconnect_backoff_ms", 5000),
]
# host:port, [v6]:port, or a resolver's scheme that gRPC knows.
_ADDRESS = re.compile(r"(?:(?:unix|dns|ipv4|ipv6|xds):\S+|(?:[^\s:/\[\]]+|\[[0-9a-fA-F:.%]+\]):\d{1,5})")


@dataclass(frozen=True)
class Tls:
    """TLS credentials; each a path, or PEM bytes.

    Attributes:
        root_certificates: whom to trust; the system's roots when left out.
        private_key: the client's key, for mutual TLS.
        certificate_chain: the client's certificate, for mutual TLS.
    """

    root_certificates: str | os.PathLike[str] | bytes | None = None
    private_key: str | os.PathLike[str] | bytes | None = None
    certificate_chain: str | os.PathLike[str] | bytes | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files. Raises OSError."""
        return grpc.ssl_channel_credentials(
            *map(_pem, (self.root_certificates, self.private_key, self.certificate_chain))
        )


#: True for TLS with the system's roots, a Tls for others.
TlsOption: TypeAlias = bool | Tls


@dataclass(frozen=True)
class Endpoint:
    """A checked address with everything a channel to it needs."""

    address: str
    credentials: grpc.ChannelCredentials | None
    metadata: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, address: str | None, tls: TlsOption, metadata: Mapping[str, str] | None) -> Endpoint:
        """From what a user gives; the address falls back to FACETEER_ADDRESS, then to localhost:50050."""
        chosen = address if address is not None else os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
        if not _ADDRESS.fullmatch(chosen):
            hint = "drop the scheme and use tls=True for TLS; pass " if "://" in chosen else "pass "
            description = f"{chosen!r} is not an address; {hint}host:port, such as {DEFAULT_ADDRESS}"
            raise InvalidArgumentError(f"address: {description}", field="address", description=description)
        tls = Tls() if tls is True else tls
        credentials = tls.credentials() if isinstance(tls, Tls) else None
        return cls(chosen, credentials, tuple((name.lower(), value) for name, value in (metadata or {}).items()))

    def channel(self) -> grpc.Channel:
        """A blocking channel; connects at the first call."""
        if self.credentials is None:
            return grpc.insecure_channel(self.address, options=_OPTIONS)
        return grpc.secure_channel(self.address, self.credentials, options=_OPTIONS)

    def async_channel(self) -> grpc.aio.Channel:
        """An asyncio channel of the running loop; connects at the first call."""
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        return grpc.aio.secure_channel(self.address, self.credentials, options=_OPTIONS)


def _pem(given: str | os.PathLike[str] | bytes | None) -> bytes | None:
    return Path(given).read_bytes() if isinstance(given, str | os.PathLike) else given
