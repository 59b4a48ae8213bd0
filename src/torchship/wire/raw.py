"""Raw tensors: little-endian row-major bytes, and length-prefixed BYTES, to arrays and back."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from torchship.errors import BadInput
from torchship.tensors import Array, as_bytes, bytes_array, numpy_dtype, plain

Buffer: TypeAlias = bytes | bytearray | memoryview
LONG = 1 << 20  # bytes of numbers as text or in typed fields that are not read or written while everybody waits
_LENGTH = struct.Struct("<I")


def decode_raw(data: Buffer, *, name: str, datatype: str, shape: Sequence[int]) -> Array:
    """An array of `shape` over the bytes of `data`, without a copy (except BYTES, whose items are copied).

    Raises BadInput when the number of bytes does not fit `shape`.
    """
    count = element_count(shape, name=name)
    if datatype == "BYTES":
        return _decode_bytes(data, name=name, count=count).reshape(shape)
    dtype = numpy_dtype(datatype)
    if len(data) != count * dtype.itemsize:
        raise BadInput(
            f"tensor {name!r} has {len(data)} bytes of data, expected {count * dtype.itemsize}",
            hint=f"{datatype} of shape {list(shape)} takes {dtype.itemsize} bytes an element",
        )
    if datatype == "BOOL":
        return np.frombuffer(data, np.uint8).astype(np.bool_).reshape(shape)  # a byte of 2 is no valid bool
    return np.frombuffer(data, dtype).reshape(shape)


def encode_raw(array: Array) -> bytes:
    """The bytes of an array as they go on the wire: row-major and little-endian, whatever its strides and byte order.

    Raises BadInput for a BYTES element that is neither bytes nor text.
    """
    if array.dtype.kind not in "OSU":
        return plain(array).tobytes()
    items = [as_bytes(item) for item in array.ravel().tolist()]
    return b"".join(part for item in items for part in (_LENGTH.pack(len(item)), item))


def element_count(shape: Sequence[int], *, name: str) -> int:
    """The product of a shape from the wire. Raises BadInput for a negative or absurd length."""
    if len(shape) > 32:
        raise BadInput(f"tensor {name!r} has {len(shape)} axes", hint="at most 32 axes")
    if shape and (min(shape) < 0 or max(shape) > 1 << 40):
        raise BadInput(f"tensor {name!r} has shape {list(shape)}", hint="lengths are 0 or more in a request")
    return math.prod(shape)


def _decode_bytes(data: Buffer, *, name: str, count: int) -> Array:
    if count * 4 > len(data):  # each element has at least its length: refuse before anything is allocated
        raise BadInput(f"tensor {name!r} has {len(data)} bytes of data, too few for {count} BYTES elements")
    items: list[bytes] = []
    place, size = 0, len(data)
    view = memoryview(data)
    for _ in range(count):
        if place + 4 > size:
            raise BadInput(f"tensor {name!r} ends after {len(items)} of {count} BYTES elements")
        (length,) = _LENGTH.unpack_from(view, place)
        place += 4
        if length > size - place:
            raise BadInput(f"tensor {name!r}: element {len(items)} says {length} bytes, {size - place} are left")
        items.append(bytes(view[place : place + length]))
        place += length
    if place != size:
        raise BadInput(f"tensor {name!r} has {size - place} bytes after its {count} BYTES elements")
    return bytes_array(items)


def varint(value: int) -> bytes:
    """An integer of 0 or more in groups of seven bits, the lowest first (protobuf; RFC 7541 section 5.1)."""
    if value < 128:
        return bytes((value,))
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: Buffer, place: int) -> tuple[int, int]:
    """An integer of up to five such bytes and the place after it. An unfinished one is too large for any data."""
    value = shift = 0
    while place < len(data) and shift < 35:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    return 1 << 62, place
