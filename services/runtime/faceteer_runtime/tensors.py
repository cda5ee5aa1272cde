"""``Tensor`` and ``EmbedsInput`` messages to numpy arrays and back; a mismatch is an :class:`InvalidField`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from faceteer.v1 import tensor_pb2

from faceteer_runtime.errors import InvalidField

# The contract's bytes are little-endian on every machine.
_DTYPES: dict[int, np.dtype] = {
    tensor_pb2.ELEMENT_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.ELEMENT_TYPE_FLOAT16: np.dtype("<f2"),
}
_MAX_DIMENSIONS = 8
_LARGEST_HALF = 65504.0


def to_array(
    tensor: tensor_pb2.Tensor,
    *,
    field: str,
    shape: Sequence[int | None] | None = None,
    finite: bool = True,
) -> np.ndarray:
    """Reads a tensor as float32.

    Args:
        tensor: float32 or float16, row-major.
        field: the tensor's path in the request, for the error.
        shape: the shape it must have; None in it matches any length.
        finite: refuse NaN and infinities.

    Returns:
        A float32 array, read-only where no conversion was needed.

    Raises:
        InvalidField: element type, shape or byte length do not fit, or a value is not finite.
    """
    dtype = _DTYPES.get(tensor.element_type)
    if dtype is None:
        raise InvalidField(f"{field}.element_type", "must be ELEMENT_TYPE_FLOAT32 or ELEMENT_TYPE_FLOAT16")
    actual = tuple(tensor.shape)
    if len(actual) > _MAX_DIMENSIONS or any(length < 0 for length in actual):
        raise InvalidField(f"{field}.shape", f"{list(actual)[:9]} is not a shape")
    if shape is not None and not _fits(actual, shape):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise InvalidField(f"{field}.shape", f"must be [{wanted}], not {list(actual)}")
    expected = math.prod(actual) * dtype.itemsize
    if len(tensor.data) != expected:
        raise InvalidField(
            f"{field}.data",
            f"must hold {expected} bytes for shape {list(actual)} of {dtype.name}, not {len(tensor.data)}",
        )
    array = np.frombuffer(tensor.data, dtype=dtype).reshape(actual).astype(np.float32, copy=False)
    if finite and not np.isfinite(array).all():
        where = int(np.flatnonzero(~np.isfinite(array.ravel()))[0])
        raise InvalidField(f"{field}.data", f"every value must be finite; element {where} is {array.ravel()[where]}")
    return array


def to_embeds(source: tensor_pb2.EmbedsInput, *, field: str, dim: int) -> str | np.ndarray:
    """Reads where an embedding comes from: the id of an earlier answer, or the values, float32 [dim].

    Raises:
        InvalidField: neither is given, or the values cannot be used.
    """
    given = source.WhichOneof("source")
    if given is None:
        raise InvalidField(field, "is missing; give embeds or an embedding_id")
    if given == "embedding_id":
        return source.embedding_id
    return to_array(source.embeds, field=f"{field}.embeds", shape=(dim,))


def to_tensor(
    array: np.ndarray, element_type: tensor_pb2.ElementType.ValueType = tensor_pb2.ELEMENT_TYPE_FLOAT32
) -> tensor_pb2.Tensor:
    """Writes an array as a tensor of ``element_type``; UNSPECIFIED is float32.

    Raises:
        InvalidField: an element type that is not in the contract, or that cannot hold the values.
    """
    if element_type == tensor_pb2.ELEMENT_TYPE_UNSPECIFIED:
        element_type = tensor_pb2.ELEMENT_TYPE_FLOAT32
    dtype = _DTYPES.get(element_type)
    if dtype is None:
        raise InvalidField("element_type", "must be ELEMENT_TYPE_FLOAT32 or ELEMENT_TYPE_FLOAT16")
    if dtype == np.float16 and np.size(array) and np.abs(array).max() > _LARGEST_HALF:
        raise InvalidField("element_type", "the values do not fit float16; ask for float32")
    values = np.ascontiguousarray(array, dtype=dtype)
    return tensor_pb2.Tensor(element_type=element_type, shape=np.shape(array), data=values.tobytes())


def _fits(actual: tuple[int, ...], shape: Sequence[int | None]) -> bool:
    if len(actual) != len(shape):
        return False
    return all(wanted is None or wanted == length for wanted, length in zip(shape, actual, strict=True))
