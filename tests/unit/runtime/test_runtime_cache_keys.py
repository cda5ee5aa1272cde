"""Cache keys: what must differ differs."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from faceteer_runtime.cache_keys import (
    cache_key,
    embedding_id,
    embeds_content_id,
    embeds_key,
    is_embedding_id,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

REVISION = "9f86d081884c7d65"


def test_a_key_by_hand() -> None:
    digest = hashlib.sha256(b"\x02\0\0\0\0\0\0\0ab" + b"\x01\0\0\0\0\0\0\0c").hexdigest()
    assert cache_key("features", REVISION, b"ab", b"c") == f"faceteer:1:features:{REVISION}:{digest}"


@given(st.lists(st.binary(max_size=8), max_size=4), st.lists(st.binary(max_size=8), max_size=4))
def test_two_lists_of_parts_share_a_key_only_if_they_are_equal(first: list[bytes], second: list[bytes]) -> None:
    same = cache_key("image", REVISION, *first) == cache_key("image", REVISION, *second)
    assert same == (first == second)


def test_pictures_of_equal_height_do_not_share_a_key() -> None:
    # Mistake 1: a cache whose key for an image was its height.
    keys = set()
    for colour in ("red", "blue"):
        file = io.BytesIO()
        Image.new("RGB", (16, 16), colour).save(file, "PNG")
        keys.add(cache_key("embeds", REVISION, file.getvalue()))
    assert len(keys) == 2


def test_models_do_not_share_answers() -> None:
    # Mistake 2: a key without the model's revision.
    assert cache_key("embeds", "aaaa", b"x") != cache_key("embeds", "bbbb", b"x")
    assert embedding_id("aaaa", b"x") != embedding_id("bbbb", b"x")
    assert embeds_content_id("aaaa", np.ones(4, np.float32)) != embeds_content_id("bbbb", np.ones(4, np.float32))


def test_kinds_dtypes_and_preprocessing_make_keys_differ() -> None:
    # Mistake 5: a key without revision, dtype and preprocessing.
    assert cache_key("embeds", REVISION, b"x") != cache_key("features", REVISION, b"x")
    assert cache_key("embeds", REVISION, b"x", b"float16") != cache_key("embeds", REVISION, b"x", b"float32")
    assert cache_key("embeds", REVISION, b"x", b"bicubic") != cache_key("embeds", REVISION, b"x", b"bilinear")


def test_a_key_needs_a_known_kind_and_a_revision() -> None:
    with pytest.raises(ValueError, match="kind"):
        cache_key("pictures", REVISION)
    for revision in ("", "a:b"):
        with pytest.raises(ValueError, match="revision"):
            cache_key("embeds", revision)


def test_an_embedding_id_leads_to_its_key() -> None:
    name = embedding_id(REVISION, b"picture")
    assert is_embedding_id(name)
    assert embeds_key(name) == cache_key("embeds", REVISION, b"picture")


@pytest.mark.parametrize("name", ["", "x", "a:b-" + "0" * 64, "a-" + "0" * 63, "x" * 100_000, "a-" + "0" * 64 + "\n"])
def test_a_foreign_id_leads_to_a_short_key_where_nothing_lies(name: str) -> None:
    assert not is_embedding_id(name)
    assert len(embeds_key(name)) < 120
    assert embeds_key(name).startswith("faceteer:1:embeds:none:")


def test_a_content_id_follows_the_values_not_the_memory_layout() -> None:
    values = np.arange(12, dtype=np.float32)
    strided = np.stack([values, values], axis=1)[:, 0]
    assert not strided.flags.c_contiguous
    assert embeds_content_id(REVISION, strided) == embeds_content_id(REVISION, values)
    assert embeds_content_id(REVISION, values.astype(np.float64)) == embeds_content_id(REVISION, values)
    nudged = values.copy()
    nudged[3] = np.nextafter(nudged[3], np.float32(99))
    assert embeds_content_id(REVISION, nudged) != embeds_content_id(REVISION, values)
