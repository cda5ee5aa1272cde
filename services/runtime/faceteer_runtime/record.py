"""Cached values as bytes: named arrays behind a header that says what they are and whose.

Layout, little-endian::

    "FCTR"  version u8  count u8  reserved u16  crc32 u32  key hash [16]     (crc32 is over everything after itself)
    count times: name length u8, dtype u8, dimensions u8, reserved u8, byte length u64, dimensions * u64, name,
                 zeros up to a multiple of 16, payload, zeros up to a multiple of 16

The key's hash is in the value because a reply can reach the wrong command: a value is only believed by its own key.
No pickle (it runs code) and no JSON (it rounds floats).
"""

from __future__ import annotations

import hashlib
import struct
import zlib

import numpy as np

Record = dict[str, np.ndarray | bytes]
"""Named arrays and byte strings: one cached value. Arrays out of a cache are read-only."""

_MAGIC = b"FCTR"
_VERSION = 1
_HEADER = struct.Struct("<4sBBHI16s")
_ENTRY = struct.Struct("<BBBBQ")
_CRC_FROM = 12
_ALIGN = 16
_BYTES = 0
_DTYPES = ("<f4", "<f2", "<f8", "<i4", "<i8", "<u4", "<u1", "|b1", "<i2", "<u2", "<u8", "<i1")
_BY_CODE = {code: np.dtype(name) for code, name in enumerate(_DTYPES, start=1)}
_BY_DTYPE = {dtype: code for code, dtype in _BY_CODE.items()}


class RecordError(ValueError):
    """Bytes that are not the record they should be, or a record that has no such form."""


def encode(key: str, record: Record) -> bytes:
    """The record as bytes that only ``key`` will accept.

    Raises:
        RecordError: more than 255 entries, a name over 255 bytes, or a dtype that is no float, integer or bool.
    """
    if len(record) > 255:
        raise RecordError("a record holds at most 255 entries")
    chunks: list[bytes] = []
    length = _HEADER.size
    for name, value in record.items():
        label = name.encode()
        if len(label) > 255:
            raise RecordError(f"the name {name[:40]!r}… is too long")
        if isinstance(value, bytes):
            code, shape, payload = _BYTES, (), value
        else:
            dtype = value.dtype.newbyteorder("<")
            if dtype not in _BY_DTYPE:
                raise RecordError(f"{name!r} has dtype {value.dtype}, which a record cannot hold")
            code, shape = _BY_DTYPE[dtype], value.shape
            payload = np.ascontiguousarray(value, dtype=dtype).tobytes()
        head = (
            _ENTRY.pack(len(label), code, len(shape), 0, len(payload)) + struct.pack(f"<{len(shape)}Q", *shape) + label
        )
        for chunk in (head, payload):
            chunks += (chunk, bytes(-(length + len(chunk)) % _ALIGN))
            length += len(chunk) + len(chunks[-1])
    body = key_hash(key) + b"".join(chunks)
    return _HEADER.pack(_MAGIC, _VERSION, len(record), 0, zlib.crc32(body), body[:16]) + body[16:]


def decode(key: str, data: bytes) -> Record:
    """The record that :func:`encode` made of it for the same key. Arrays are read-only views of ``data``.

    Raises:
        RecordError: foreign, damaged, of another version, or another key's.
    """
    try:
        return _decode(key, data)
    except (struct.error, UnicodeDecodeError, ValueError, KeyError) as error:
        raise RecordError(f"not a record of {key}: {error}") from None


def _decode(key: str, data: bytes) -> Record:
    magic, version, count, _, crc, owner = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION:
        raise RecordError("another format")
    if owner != key_hash(key):
        raise RecordError("another key's value")
    if zlib.crc32(memoryview(data)[_CRC_FROM:]) != crc:
        raise RecordError("damaged")
    record: Record = {}
    offset = _HEADER.size
    for _ in range(count):
        label_length, code, dimensions, _, length = _ENTRY.unpack_from(data, offset)
        shape = struct.unpack_from(f"<{dimensions}Q", data, offset + _ENTRY.size)
        label_at = offset + _ENTRY.size + 8 * dimensions
        name = data[label_at : label_at + label_length].decode()
        start = label_at + label_length
        start += -start % _ALIGN
        end = start + length
        if end > len(data):
            raise RecordError("cut off")
        if code == _BYTES:
            record[name] = data[start:end]
        else:
            dtype = _BY_CODE[code]
            record[name] = np.frombuffer(data, dtype, count=length // dtype.itemsize, offset=start).reshape(shape)
        offset = end + -end % _ALIGN
    if offset != len(data):
        raise RecordError("wrong length")
    return record


def key_hash(key: str) -> bytes:
    """16 bytes that stand for the key."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def frozen(record: Record) -> Record:
    """A copy that nobody else can change: each array owns its values and is read-only."""
    return {name: value if isinstance(value, bytes) else _frozen_array(value) for name, value in record.items()}


def size_of(record: Record) -> int:
    """Bytes that the record's values and names take, about."""
    return sum(len(name) + (len(value) if isinstance(value, bytes) else value.nbytes) for name, value in record.items())


def _frozen_array(array: np.ndarray) -> np.ndarray:
    copy = np.array(array, order="C", copy=True)
    copy.flags.writeable = False
    return copy
