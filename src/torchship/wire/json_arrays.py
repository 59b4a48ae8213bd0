"""Numbers and strings in JSON to arrays and back: typed all the way, so that a fault names its element."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from torchship.errors import BadInput
from torchship.tensors import FLOATS, Array, as_bytes, bytes_array, numpy_dtype
from torchship.wire.raw import LONG, Buffer, element_count

# The largest double that still rounds to a finite number of the type.
_FLOAT_MAX = {"FP16": 65519.99999999999, "BF16": 3.3961775292304601e38, "FP32": 3.4028235677973362e38}
_MAX_DEPTH = 32
_OPENING = re.compile(rb"[\[ \n\t\r]*")
_PIECE = 1 << 18  # bytes of a long list that are read at a time
_ELEMENTS = 1 << 14  # of a long output that are written at a time
# How JSON, which has no such numbers, tells them: as the JSON mapping of protobuf does, whose messages these are.
NON_FINITE = ("NaN", "Infinity", "-Infinity")
_SPELT = dict(zip(("nan", "inf", "-inf"), NON_FINITE, strict=True))
_CONSTANTS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|-?(?:NaN|Infinity)\b', re.DOTALL)  # takes linear time


def _element(datatype: str) -> Any:
    if datatype == "BYTES":
        return str
    if datatype == "BOOL":
        return bool | Annotated[int, msgspec.Meta(ge=0, le=1)]
    if datatype in _FLOAT_MAX:
        return Annotated[float, msgspec.Meta(ge=-_FLOAT_MAX[datatype], le=_FLOAT_MAX[datatype])]
    if datatype == "FP64":
        return float
    info = np.iinfo(numpy_dtype(datatype))
    if info.max > np.iinfo(np.int64).max or info.min == np.iinfo(np.int64).min:
        return int  # msgspec's bounds are int64: numpy checks these two
    return Annotated[int, msgspec.Meta(ge=int(info.min), le=int(info.max))]


@lru_cache(maxsize=256)  # bounded: 14 datatypes by 32 depths, and callers choose both
def _decoder(datatype: str, depth: int, spelt: bool = False) -> msgspec.json.Decoder[Any]:
    kind: Any = _element(datatype) | Literal[NON_FINITE] if spelt else _element(datatype)
    for _ in range(depth):
        kind = list[kind]
    return msgspec.json.Decoder(kind)


def decode_json_data(data: Buffer | msgspec.Raw, *, name: str, datatype: str, shape: Sequence[int]) -> Array:
    """An array of `shape` from JSON `data`, flat or nested, row-major.

    Integers and `NON_FINITE` strings are taken for floats, 0 and 1 for booleans; everything else that is not of the
    datatype, out of its range, ragged or of another number of elements is refused. Raises BadInput naming the element.
    """
    count = element_count(shape, name=name)
    dtype = numpy_dtype(datatype)
    text = memoryview(data)
    depth = _depth(text) if len(text) > 1 and text[1] in b"[ \n\t\r" else 1
    try:
        items = _items(text, datatype, depth)
        array = _bytes_array(items, depth) if datatype == "BYTES" else np.array(items, dtype)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as fault:
        raise BadInput(f"tensor {name!r} of {datatype}: {_explain(fault)}", hint="see data of this input") from None
    if depth == 1 and array.size == count:
        return array.reshape(shape)
    if array.shape == tuple(shape):
        return array
    got = f"{array.size} elements" if depth == 1 else f"shape {list(array.shape)}"
    raise BadInput(f"tensor {name!r} has data of {got}, expected {count} elements of shape {list(shape)}")


def _items(text: memoryview, datatype: str, depth: int) -> Any:
    if (
        depth == 1
        and datatype != "BYTES"
        and len(text) > 2 * _PIECE
        and (found := _in_pieces(text, datatype)) is not None
    ):
        return found
    try:
        return _decoder(datatype, depth).decode(text)
    except msgspec.ValidationError:
        if datatype not in FLOATS or (b"N" not in bytes(text) and b"I" not in bytes(text)):
            raise
        with suppress(msgspec.MsgspecError):  # the first fault tells more
            return np.array(_decoder(datatype, depth, True).decode(text), np.float64)
        raise


def _in_pieces(text: memoryview, datatype: str) -> Array | None:
    """A long flat list of numbers, cut at commas, so that other threads get their turn; None for all that is not one.

    The parser holds the interpreter's lock for as long as it reads. Whoever called tells what is wrong with the whole.
    """
    data, decode, dtype = bytes(text).strip(), _decoder(datatype, 1).decode, numpy_dtype(datatype)
    place, end, parts = 1, len(data) - 1, []
    if data[:1] != b"[" or data[-1:] != b"]":
        return None
    try:
        while True:
            cut = data.find(b",", place + _PIECE, end)
            items = decode(b"[%b]" % data[place : cut if cut >= 0 else end])
            if not items:
                return None
            parts.append(np.array(items, dtype))
            if cut < 0:
                return np.concatenate(parts)
            place = cut + 1
    except (msgspec.MsgspecError, ValueError, OverflowError):
        return None


def encode_output(array: Array) -> list[Any] | msgspec.Raw:
    """The data of an output for the encoder; a long one is text already, made piece by piece as long input is read."""
    if array.nbytes <= LONG:
        return encode_json_data(array)
    flat, encode = array.ravel(), msgspec.json.encode
    pieces = [flat[at : at + _ELEMENTS] for at in range(0, flat.size, _ELEMENTS)]
    return msgspec.Raw(b"[%b]" % b",".join([encode(encode_json_data(piece))[1:-1] for piece in pieces]))


def encode_json_data(array: Array) -> list[Any]:
    """The elements of an array in row-major order as JSON can print them: NaN and infinity as `NON_FINITE` strings.

    BYTES must be UTF-8 to travel as JSON. Raises BadInput when they are not.
    """
    items: list[Any] = array.ravel().tolist()
    if array.dtype.kind not in "OSU":
        if array.dtype.kind in "biu" or np.isfinite(array).all():
            return items
        return [item if math.isfinite(item) else _SPELT[str(item)] for item in items]
    try:
        return [as_bytes(item).decode() for item in items]
    except UnicodeDecodeError:
        raise BadInput("a BYTES output is not UTF-8", hint="ask for binary output (binary_data: true)") from None


def quote_constants(text: Buffer) -> bytes | None:
    """JSON in which the bare `NaN`, `Infinity` and `-Infinity` that Python and RapidJSON write became strings.

    None where it holds none outside of its strings.
    """
    given = bytes(text)
    if b"NaN" not in given and b"Infinity" not in given:
        return None
    quoted = _CONSTANTS.sub(lambda found: found[0] if found[0][:1] == b'"' else b'"%b"' % found[0], given)
    return quoted if len(quoted) > len(given) else None


def _depth(text: memoryview) -> int:
    opening = _OPENING.match(text, 0, 4096)
    depth = bytes(opening[0]).count(b"[") if opening else 0
    if depth > _MAX_DEPTH:
        raise BadInput(f"data is nested deeper than {_MAX_DEPTH}", hint="send it flat")
    return max(depth, 1)


def _bytes_array(items: list[Any], depth: int) -> Array:
    array = bytes_array(items) if depth == 1 else np.array(items, np.object_)
    flat = array.ravel().tolist()
    if any(isinstance(item, list) for item in flat):
        raise ValueError("nested lists differ in their length")
    return bytes_array([item.encode() for item in flat]).reshape(array.shape)


def _explain(fault: Exception) -> str:
    text = str(fault)
    if "inhomogeneous" in text:
        return "nested lists differ in their length"
    if isinstance(fault, OverflowError):
        return "an integer is out of range"
    return text.replace("$", "data")
