"""Tensors to arrays and back."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from faceteer.v1 import tensor_pb2
from faceteer_runtime.errors import InvalidField
from faceteer_runtime.tensors import to_array, to_tensor
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

F32, F16 = tensor_pb2.ELEMENT_TYPE_FLOAT32, tensor_pb2.ELEMENT_TYPE_FLOAT16


def tensor(data: bytes, shape: list[int], element_type: int = F32) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(element_type=element_type, shape=shape, data=data)


def test_the_bytes_are_little_endian_and_row_major() -> None:
    message = to_tensor(np.array([[1.0, 2.0], [3.0, -4.5]], np.float32))
    assert message.data == struct.pack("<4f", 1.0, 2.0, 3.0, -4.5)
    assert list(message.shape) == [2, 2]
    assert to_tensor(np.array([[1.0, 2.0], [3.0, 4.0]]).T).data == struct.pack("<4f", 1.0, 3.0, 2.0, 4.0)


@given(stnp.arrays(np.float32, stnp.array_shapes(max_dims=3, min_side=0), elements=st.floats(width=32)))
def test_float32_survives_the_round_trip_bit_for_bit(array: np.ndarray) -> None:
    back = to_array(to_tensor(array), field="x", finite=False)
    assert back.dtype == np.float32
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


def test_float16_is_read_as_float32() -> None:
    message = to_tensor(np.array([1.5, -2.25, 65504.0]), F16)
    assert len(message.data) == 6
    back = to_array(message, field="x", shape=(3,))
    assert back.dtype == np.float32
    assert back.tolist() == [1.5, -2.25, 65504.0]


def test_unspecified_in_a_request_means_float32() -> None:
    assert to_tensor(np.ones(2), tensor_pb2.ELEMENT_TYPE_UNSPECIFIED).element_type == F32


@pytest.mark.parametrize(
    ("message", "field", "words"),
    [
        (tensor(b"", [0], 0), "embeds.element_type", "FLOAT32"),
        (tensor(b"", [0], 77), "embeds.element_type", "FLOAT32"),
        (tensor(bytes(16), [2, 2]), "embeds.shape", "[4]"),
        (tensor(bytes(12), [3]), "embeds.shape", "[4]"),
        (tensor(bytes(4), [-1]), "embeds.shape", "not a shape"),
        (tensor(b"", [1] * 9), "embeds.shape", "not a shape"),
        (tensor(bytes(15), [4]), "embeds.data", "16 bytes"),
        (tensor(bytes(16), [4], F16), "embeds.data", "8 bytes"),
        (tensor(struct.pack("<4f", 0, 0, float("nan"), 0), [4]), "embeds.data", "element 2 is nan"),
        (tensor(struct.pack("<4f", 0, float("-inf"), 0, 0), [4]), "embeds.data", "element 1 is -inf"),
        (tensor(struct.pack("<4e", 0, 0, 0, float("inf")), [4], F16), "embeds.data", "element 3 is inf"),
    ],
)
def test_every_mismatch_names_the_field_and_what_would_be_right(message, field: str, words: str) -> None:
    with pytest.raises(InvalidField) as caught:
        to_array(message, field="embeds", shape=(4,))
    assert caught.value.field == field
    assert words in caught.value.message


def test_a_shape_of_astronomical_size_is_refused_without_allocating() -> None:
    with pytest.raises(InvalidField):
        to_array(tensor(b"", [2**62, 2**62]), field="x", shape=(None, None))


def test_none_in_a_shape_matches_any_length() -> None:
    assert to_array(tensor(bytes(24), [3, 2]), field="x", shape=(None, 2)).shape == (3, 2)


def test_values_that_do_not_fit_float16_are_refused_rather_than_made_infinite() -> None:
    assert to_array(to_tensor(np.array([-65504.0]), F16), field="x").tolist() == [-65504.0]
    for value in (65505.0, -65505.0):
        with pytest.raises(InvalidField) as refused:
            to_tensor(np.array([1.0, value]), F16)
        assert refused.value.field == "element_type"
    assert to_tensor(np.empty(0), F16).data == b""
