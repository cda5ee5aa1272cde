"""Pages of a list: sizes, and tokens that fit one request only."""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Any, NamedTuple

from faceteer_runtime.errors import InvalidField

_MOST_ITEMS = 2**31 - 1  # total_size is an int32
# Computed from another field for every page, so two pages may differ by rounding.
_DERIVED = ("words_embeds",)


class Page(NamedTuple):
    """Where a page begins and how many items it holds at most."""

    offset: int
    size: int


def read_page(request: Any, *, default: int, most: int) -> Page:
    """The page that a request with ``page_size`` and ``page_token`` asks for.

    Raises:
        InvalidField: a negative size; a token that is not ours, or of a request that differed otherwise.
    """
    if request.page_size < 0:
        raise InvalidField("page_size", f"must not be negative, but is {request.page_size}")
    size = min(request.page_size or default, most)
    if not request.page_token:
        return Page(0, size)
    try:
        offset, digest = base64.urlsafe_b64decode(request.page_token.encode()).decode().split(".")
        if digest == _digest(request) and 0 <= int(offset) <= _MOST_ITEMS:
            return Page(int(offset), size)
    except (binascii.Error, ValueError):
        pass
    raise InvalidField(
        "page_token", "belongs to another request; take it from the previous page and change nothing else"
    )


def next_token(request: Any, page: Page, total: int) -> str:
    """The next page's token; empty on the last page."""
    offset = page.offset + page.size
    if offset >= total:
        return ""
    return base64.urlsafe_b64encode(f"{offset}.{_digest(request)}".encode()).decode()


def _digest(request: Any) -> str:
    bare = type(request)()
    bare.CopyFrom(request)
    bare.page_token = ""
    bare.page_size = 0
    for field in _DERIVED:
        if field in bare.DESCRIPTOR.fields_by_name:
            bare.ClearField(field)
    if bare.DESCRIPTOR.fields_by_name.get("activations") is not None and bare.HasField("activations"):
        # Of a picture's features only their indices: the last digits of activations may differ.
        del bare.activations.activations[:], bare.activations.scaled[:]
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()[:16]
