"""The request being answered: its id and its call, from anywhere in the process.

The interceptor fills it in; reading it needs no gRPC.
"""

from __future__ import annotations

import os
import re
from contextvars import ContextVar
from dataclasses import dataclass, field

# What is safe in a log line and a header.
_SANE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,64}\Z")


@dataclass(frozen=True, slots=True)
class RequestContext:
    """One call.

    Attributes:
        request_id: from the caller's ``x-request-id`` or new; empty outside a request.
        method: full name, "/faceteer.v1.EncoderService/EncodeImages".
        access_key: the caller's ``x-faceteer-access``; a secret, so it is neither shown nor logged.
    """

    request_id: str = ""
    method: str = ""
    access_key: str = field(default="", repr=False)


_NONE = RequestContext()
_current: ContextVar[RequestContext] = ContextVar("faceteer_request", default=_NONE)


def request_context() -> RequestContext:
    """The request that this task works for; one with empty fields outside a request."""
    return _current.get()


def enter_request(request_id: str, method: str, access_key: str = "") -> RequestContext:
    """Makes this the task's current request. gRPC runs each call in a task of its own, so nothing is restored."""
    context = RequestContext(request_id, method, access_key)
    _current.set(context)
    return context


def new_request_id() -> str:
    """16 random hexadecimal digits."""
    return os.urandom(8).hex()


def sane_request_id(value: str | bytes) -> str | None:
    """``value`` if it is 1 to 64 of ``A-Z a-z 0-9 . _ : -``, else None: it goes into logs and headers."""
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    return text if _SANE_ID.match(text) else None
