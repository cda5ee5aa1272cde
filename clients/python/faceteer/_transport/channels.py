"""Where the server is and how to reach it: addresses, TLS, credentials, channel options."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio

from faceteer._errors import invalid

DEFAULT_ADDRESS = "localhost:50050"
ADDRESS_VARIABLE = "FACETEER_ADDRESS"
ACCESS_KEY_VARIABLE = "FACETEER_ACCESS_KEY"
ACCESS_KEY_METADATA = "x-faceteer-access"

_OPTIONS: list[tuple[str, Any]] = [
    # Pictures at full size are larger than gRPC's 4 MiB; the server's own limits bound what is sent.
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),
    ("grpc.max_send_message_length", -1),
    # A server that is just starting is found within its first seconds.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Despite its name: how long one attempt to connect may take. An address that drops packets is given up
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
    # Keys and tokens are in it: kept out of every repr.
    metadata: tuple[tuple[str, str], ...] = field(repr=False)

    @classmethod
    def of(
        cls, address: str | None, tls: TlsOption, metadata: Mapping[str, str] | None, access_key: str | None = None
    ) -> Endpoint:
        """From what a user gives; the address falls back to FACETEER_ADDRESS, then to localhost:50050, the access
        key to FACETEER_ACCESS_KEY, then to none."""
        chosen = address if address is not None else os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
        if not _ADDRESS.fullmatch(chosen):
            hint = "drop the scheme and use tls=True for TLS; pass " if "://" in chosen else "pass "
            description = f"{chosen!r} is not an address; {hint}host:port, such as {DEFAULT_ADDRESS}"
            raise invalid("address", description)
        tls = Tls() if tls is True else tls
        credentials = tls.credentials() if isinstance(tls, Tls) else None
        sent = {name.lower(): value for name, value in (metadata or {}).items()}
        if access_key is not None or ACCESS_KEY_METADATA not in sent:
            key = access_key if access_key is not None else os.environ.get(ACCESS_KEY_VARIABLE, "").strip()
            if access_key is not None or key:
                sent[ACCESS_KEY_METADATA] = _key(key)
        return cls(chosen, credentials, tuple(sent.items()))

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


def _key(key: str) -> str:
    """An access key that can travel as metadata. Never shown in the error."""
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        description = f"must be printable ASCII without spaces around it; check the argument or {ACCESS_KEY_VARIABLE}"
        raise invalid("access_key", description)
    return key


def _pem(given: str | os.PathLike[str] | bytes | None) -> bytes | None:
    return Path(given).read_bytes() if isinstance(given, str | os.PathLike) else given
