"""Tensors as one safetensors file, BF16 and BYTES included: plain data that nothing ever unpickles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from torchship.errors import BadInput, CorruptArtifact
from torchship.tensors import Array, Tensors, dtype_name, numpy_dtype

_FROM_FILE = {
    "BOOL": "BOOL", "U8": "UINT8", "U16": "UINT16", "U32": "UINT32", "U64": "UINT64",
    "I8": "INT8", "I16": "INT16", "I32": "INT32", "I64": "INT64",
    "F16": "FP16", "BF16": "BF16", "F32": "FP32", "F64": "FP64",
}  # fmt: skip
_ENDS = ".__ends__"  # beside a BYTES tensor's content: where each element ends, in the tensor's shape


def encode(tensors: Tensors) -> bytes:
    """The bytes of a safetensors file. A BYTES tensor is two entries: its content, and where each element ends.

    Raises BadInput for a dtype without a wire datatype.
    """
    flat: dict[str, Array] = {}
    for name, array in tensors.items():
        if dtype_name(array.dtype) != "BYTES":
            flat[name] = np.ascontiguousarray(array).reshape(array.shape)
            continue
        elements = [element if isinstance(element, bytes) else str(element).encode() for element in array.ravel()]
        ends = np.cumsum([len(element) for element in elements], dtype=np.int64).reshape(array.shape)
        flat[name] = np.frombuffer(b"".join(elements), np.uint8)
        flat[name + _ENDS] = ends
    return safetensors.numpy.save(flat)


def decode(data: bytes) -> dict[str, Array]:
    """Undo `encode`. Raises BadInput when `data` is not a safetensors file of known datatypes."""
    try:
        arrays: dict[str, Array] = {
            name: np.frombuffer(entry["data"], numpy_dtype(_FROM_FILE[entry["dtype"]])).reshape(entry["shape"])
            for name, entry in safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        }
        return {
            name: _elements(array, arrays[name + _ENDS]) if name + _ENDS in arrays else array
            for name, array in arrays.items()
            if not name.endswith(_ENDS)
        }
    except (safetensors.SafetensorError, KeyError, ValueError) as fault:
        raise BadInput(
            f"not a readable safetensors file: {fault}", hint="write it with the safetensors library"
        ) from None


def _elements(content: Array, ends: Array) -> Array:
    raw = content.tobytes()
    flat = ends.ravel().tolist()
    starts = [0, *flat][:-1]
    if ends.dtype != np.int64 or any(
        not 0 <= start <= end <= len(raw) for start, end in zip(starts, flat, strict=True)
    ):
        raise ValueError("the elements of a BYTES tensor do not lie within its content")
    found = np.empty(len(flat), object)
    found[:] = [raw[start:end] for start, end in zip(starts, flat, strict=True)]
    return found.reshape(ends.shape)


def load(path: Path) -> dict[str, Array]:
    """The tensors of a safetensors file; none when there is no such file. Raises CorruptArtifact."""
    try:
        return decode(path.read_bytes())
    except FileNotFoundError:
        return {}
    except BadInput as fault:
        raise CorruptArtifact(f"{path}: {fault}", hint=fault.hint) from None
