"""The record codec: exact for its own key, a miss for anything else."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from faceteer_runtime.record import RecordError, decode, encode, frozen, size_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

KEY = "faceteer:1:embeds:aaaa:" + "0" * 64
DTYPES = st.sampled_from([np.float32, np.float16, np.float64, np.int32, np.int64, np.uint32, np.uint8, np.bool_])
VALUES = st.one_of(st.binary(max_size=64), stnp.arrays(DTYPES, stnp.array_shapes(min_dims=0, max_dims=3, min_side=0)))
RECORDS = st.dictionaries(st.text(max_size=12), VALUES, max_size=4)


def assert_equal(first, second) -> None:
    assert list(first) == list(second)
    for name, value in first.items():
        other = second[name]
        if isinstance(value, bytes):
            assert value == other
        else:
            assert (value.dtype, value.shape) == (other.dtype, other.shape)
            assert value.tobytes() == other.tobytes()


@given(RECORDS)
def test_a_record_survives_bit_for_bit(record) -> None:
    assert_equal(record, decode(KEY, encode(KEY, record)))


def test_big_endian_and_strided_arrays_are_stored_by_value() -> None:
    record = {"big": np.arange(4, dtype=">f4"), "strided": np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2]}
    back = decode(KEY, encode(KEY, record))
    assert back["big"].tolist() == [0, 1, 2, 3]
    assert back["strided"].tolist() == record["strided"].tolist()


@settings(max_examples=300)
@given(RECORDS, st.data())
def test_a_flipped_bit_anywhere_is_noticed(record, data) -> None:
    good = encode(KEY, record)
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    # The two reserved bytes of the header are the only ones that nothing depends on.
    if bit // 8 in (6, 7):
        return
    with pytest.raises(RecordError):
        decode(KEY, bytes(bad))


@given(RECORDS, st.data())
def test_a_cut_off_or_longer_value_is_noticed(record, data) -> None:
    good = encode(KEY, record)
    with pytest.raises(RecordError):
        decode(KEY, good[: data.draw(st.integers(0, len(good) - 1))])
    with pytest.raises(RecordError):
        decode(KEY, good + b"\0")


def test_the_value_of_another_key_is_not_believed() -> None:
    with pytest.raises(RecordError, match="another key"):
        decode(KEY, encode(KEY[:-1] + "1", {"embeds": np.ones(3, np.float32)}))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a value from the cache was unpickled",))


@pytest.mark.parametrize(
    "value", [b"", b"{}", b"FCTR", b"[0.1, 0.2]", bytes(64), pickle.dumps(Bomb()), b"FCTR" + bytes(60)]
)
def test_foreign_bytes_are_a_record_error(value: bytes) -> None:
    with pytest.raises(RecordError):
        decode(KEY, value)


def test_what_cannot_be_stored_is_said() -> None:
    with pytest.raises(RecordError, match="dtype"):
        encode(KEY, {"x": np.array(["text"])})
    with pytest.raises(RecordError, match="dtype"):
        encode(KEY, {"x": np.array([object()])})
    with pytest.raises(RecordError, match="name"):
        encode(KEY, {"x" * 256: b""})


def test_a_frozen_record_shares_nothing_with_what_it_was_made_of() -> None:
    array = np.zeros(3, np.float32)
    record = frozen({"x": array})
    array[0] = 1.0
    assert record["x"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        record["x"][0] = 1.0


def test_decoded_arrays_are_read_only_and_aligned() -> None:
    back = decode(KEY, encode(KEY, {"a": b"123", "longer name": np.ones(5, np.float64)}))
    assert not back["longer name"].flags.writeable
    assert back["longer name"].flags.aligned


def test_size_counts_bytes() -> None:
    assert size_of({"ab": np.zeros((2, 3), np.float32), "c": b"12345"}) == 24 + 2 + 5 + 1


def test_the_bytes_are_those_that_other_processes_wrote() -> None:
    # By hand, after the module's layout: servers of two versions may share one Redis.
    written = bytes.fromhex(
        "46435452" "01" "02" "0000" "5faca39a" "61f5dc14830084d8dc2d1ebc02ef3dec"
        "01010100" "0800000000000000" "0200000000000000" "78" + "00" * 15 + "0000c03f000000c0" + "00" * 8
        + "04000000" "0200000000000000" "6e616d65" "6162" + "00" * 14
    )  # fmt: skip
    made = encode("k", {"x": np.array([1.5, -2.0], np.float32), "name": b"ab"})
    assert made == written
    read = decode("k", written)
    assert (read["x"].tolist(), read["name"]) == ([1.5, -2.0], b"ab")
