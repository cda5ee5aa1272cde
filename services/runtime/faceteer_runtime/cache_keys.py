"""The names of cached things: content addressed, so that nothing is ever invalidated.

Every key carries the kind, the revision of what computed the value (weights and
preprocessing) and a hash of everything else that the value depends on.
"""

from __future__ import annotations

import hashlib
import re
import sys

import numpy as np

SCHEMA = "1"
EMBEDS = "embeds"
FEATURES = "features"
IMAGE = "image"
NOISE = "noise"
KINDS = (EMBEDS, FEATURES, IMAGE, NOISE)

_EMBEDDING_ID = re.compile(r"[A-Za-z0-9_.+]{1,64}-[0-9a-f]{64}\Z")


def content_hash(*parts: bytes) -> str:
    """SHA-256 in hexadecimal over the parts, each preceded by its length: ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def cache_key(kind: str, revision: str, *parts: bytes) -> str:
    """``faceteer:1:<kind>:<revision>:<sha256>``.

    Args:
        kind: one of :data:`KINDS`.
        revision: of the bundle part (or parts, joined by "+") that computes the value.
        parts: all that the value depends on besides: content, preprocessing, parameters, dtype.
    """
    if kind not in KINDS:
        raise ValueError(f"no such kind of cached thing: {kind!r}")
    if not revision or ":" in revision:
        raise ValueError(f"a revision is not empty and holds no colon: {revision!r}")
    return f"faceteer:{SCHEMA}:{kind}:{revision}:{content_hash(*parts)}"


def embedding_id(encoder_revision: str, *parts: bytes) -> str:
    """``<encoder revision>-<sha256>``: the name of an embedding, from what it was computed from."""
    return f"{encoder_revision}-{content_hash(*parts)}"


def is_embedding_id(value: str) -> bool:
    """Whether ``value`` has the form of an embedding id."""
    return _EMBEDDING_ID.match(value) is not None


def embeds_key(embedding_id: str) -> str:
    """The cache key of an embedding's Record {"embeds": float32 [d]}.

    An id comes from outside: one without an id's form gets a key too, of bounded length, under which nothing is stored.
    """
    if not is_embedding_id(embedding_id):
        return cache_key(EMBEDS, "none", embedding_id.encode())
    revision, _, digest = embedding_id.partition("-")
    return f"faceteer:{SCHEMA}:{EMBEDS}:{revision}:{digest}"


def embeds_content_id(encoder_revision: str, embeds: np.ndarray) -> str:
    """The id of an embedding that came inline or out of an edit, from its float32 values. ``embeds`` has shape [d]."""
    values = np.ascontiguousarray(embeds, dtype=np.float32)
    if sys.byteorder == "big":
        values = values.byteswap()
    return embedding_id(encoder_revision, b"content", values.tobytes())
