"""Embeddings between numpy and ``faceteer.v1.Tensor``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from faceteer._errors import InternalError, invalid
from faceteer.v1 import tensor_pb2

if TYPE_CHECKING:
    import numpy.typing as npt

_DTYPES: dict[int, np.dtype[Any]] = {
    tensor_pb2.ELEMENT_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.ELEMENT_TYPE_FLOAT16: np.dtype("<f2"),
}


def to_array(tensor: tensor_pb2.Tensor) -> npt.NDArray[np.float32]:
    """A server's tensor as a read-only float32 array of its shape."""
    dtype = _DTYPES.get(tensor.element_type)
    shape = tuple(tensor.shape)
    if dtype is None or len(tensor.data) != math.prod(shape) * dtype.itemsize:
        raise InternalError(f"the server sent a tensor of shape {list(shape)} with {len(tensor.data)} bytes")
    array: npt.NDArray[np.float32] = np.frombuffer(tensor.data, dtype).reshape(shape).astype(np.float32, copy=False)
    array.flags.writeable = False
    return array


def to_tensor(embeds: npt.NDArray[Any]) -> tensor_pb2.Tensor:
    """One embedding [d], any float dtype, as a float32 tensor. Raises InvalidArgumentError when it is no such thing."""
    array = np.asarray(embeds)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "fiu":
        raise invalid(
            "embeds", f"an array of {array.dtype}, shape {list(array.shape)}; pass one embedding, float32 [d]"
        )
    array = np.ascontiguousarray(array, dtype="<f4")
    if not np.isfinite(array).all():
        raise invalid("embeds", "NaN or infinite values; every value must be finite")
    return tensor_pb2.Tensor(element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32, shape=array.shape, data=array.tobytes())
