"""The in-process tier."""

from __future__ import annotations

import numpy as np
from faceteer_runtime.lru import Lru
from faceteer_runtime.record import frozen
from hypothesis import given
from hypothesis import strategies as st


def record(n: int, value: float = 0.0):
    return frozen({"x": np.full(n, value, np.uint8)})


def test_the_least_recently_used_goes_first() -> None:
    lru = Lru(10_000)
    for key in "abc":
        lru.put(key, record(1500))
    assert lru.get("a") is not None
    for key in "def":
        lru.put(key, record(1500))
    assert lru.get("b") is None
    assert lru.get("a") is not None


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 3000)), max_size=60))
def test_it_never_holds_more_bytes_than_it_may_and_counts_them_right(puts) -> None:
    lru = Lru(10_000)
    for key, size in puts:
        lru.put(key, record(size))
        assert lru.bytes <= 10_000
    held = [lru.get(key) for key in "abcdefgh"]
    assert sum(r["x"].nbytes for r in held if r is not None) <= lru.bytes
    lru.clear()
    assert (lru.bytes, len(lru)) == (0, 0)


def test_the_latest_put_wins() -> None:
    lru = Lru(10_000)
    lru.put("a", record(3, 1))
    lru.put("a", record(3, 2))
    assert lru.get("a")["x"].tolist() == [2, 2, 2]
    assert len(lru) == 1


def test_one_huge_value_does_not_push_out_everything() -> None:
    lru = Lru(10_000)
    lru.put("a", record(100))
    assert not lru.put("huge", record(9_000))
    assert lru.get("a") is not None


def test_no_capacity_means_no_cache() -> None:
    lru = Lru(0)
    assert not lru.put("a", record(0))
    assert lru.get("a") is None


def test_a_callers_changes_do_not_reach_the_cache() -> None:
    lru = Lru(10_000)
    lru.put("a", record(3))
    got = lru.get("a")
    got["x"] = b"changed"
    assert lru.get("a")["x"].tolist() == [0, 0, 0]


def test_an_entry_counts_with_its_values_its_names_and_512_bytes_of_overhead() -> None:
    lru = Lru(4000)
    assert lru.put("key", record(400))
    assert lru.bytes == 400 + len("x") + len("key") + 512
    assert lru.put("key", record(100))
    assert lru.bytes == 100 + len("x") + len("key") + 512


def test_a_value_may_take_a_quarter_of_the_room_and_all_of_it_may_be_used() -> None:
    largest = 1000 - 512 - len("a") - len("x")
    lru = Lru(4000)
    assert not lru.put("a", record(largest + 1))
    for key in "abcd":
        assert lru.put(key, record(largest))
    assert (lru.bytes, len(lru)) == (4000, 4)
    lru.put("e", record(0))
    assert lru.get("a") is None
    assert len(lru) == 4
