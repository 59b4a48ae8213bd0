"""Reads the tensors for a signature out of a file of the user's, and writes tensors to one."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from torchship import textfiles
from torchship.artifact import folder as folders
from torchship.artifact import tensorfile
from torchship.errors import BadInput, NotFound
from torchship.tensors import Array, Signature, Tensors, bytes_array, dtype_name, numpy_dtype, plain
from torchship.wire.json_arrays import encode_json_data


def read(path: Path, *, signature: Signature, mean: Sequence[float] = (), std: Sequence[float] = ()) -> Tensors:
    """Tensors for `signature` out of .npy, .npz, .json, .safetensors, a picture, or any file for a BYTES input.

    JSON is a request of the Open Inference Protocol, a mapping of names to nested lists, or one nested list.
    Raises NotFound, BadInput naming the file.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"no file {path}") from None
    except IsADirectoryError:
        raise BadInput(f"{path} is a folder", hint="give a file") from None
    try:
        return _decode(path, data, signature, mean, std)
    except BadInput as fault:
        raise BadInput(f"{path.name}: {fault}", hint=fault.hint) from None


def read_any(path: Path) -> Tensors:
    """All tensors of an .npz or .safetensors file. Raises BadInput."""
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".safetensors"):
        raise BadInput(f"{path.name}: named tensors are needed", hint="use .npz or .safetensors")
    return _loaded(path.read_bytes(), suffix)


def _decode(path: Path, data: bytes, signature: Signature, mean: Sequence[float], std: Sequence[float]) -> Tensors:
    from torchship.stages.images import reader
    from torchship.stages.picture import SUFFIXES

    suffix = path.suffix.lower()
    only = signature.required[0] if len(signature.required) == 1 else None
    if only and only.dtype == "BYTES" and suffix not in (".npy", ".npz", ".json", ".safetensors"):
        return {only.name: bytes_array([data]).reshape([1] * len(only.shape))}
    if suffix in (".npz", ".safetensors"):
        return _loaded(data, suffix)
    if suffix == ".json":
        return _json(textfiles.decode(data, where=path.name), signature)
    if only is None:
        raise BadInput(f"one tensor for {len(signature.required)} inputs", hint="use .npz, .json or .safetensors")
    if suffix == ".npy":
        return {only.name: _loaded(data, suffix)[""]}
    if suffix in SUFFIXES:
        return {only.name: reader(only, mean=mean, std=std)(data)[None]}
    raise BadInput(
        f"a {suffix or 'nameless'} file is not understood", hint="use npy, npz, json, safetensors, a picture"
    )


def _loaded(data: bytes, suffix: str) -> Tensors:
    """The arrays by name of an .npz or .safetensors file; the only one of an .npy file has no name."""
    if suffix == ".safetensors":
        return tensorfile.decode(data)
    try:
        found = np.load(io.BytesIO(data), allow_pickle=False)
        return {"": found} if suffix == ".npy" else {name: found[name] for name in found.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, AttributeError) as fault:
        how = "save" if suffix == ".npy" else "savez"
        raise BadInput(f"not a readable {suffix} file: {fault}", hint=f"write it with numpy.{how}") from None


def _json(text: str, signature: Signature) -> Tensors:
    try:
        found = msgspec.json.decode(text)
    except msgspec.MsgspecError as fault:
        raise BadInput(f"not JSON: {fault}") from None
    if isinstance(found, list) and len(signature.required) == 1:
        found = {signature.required[0].name: found}
    if not isinstance(found, dict):
        raise BadInput("not a mapping of names to lists", hint='as in {"x": [[1, 2, 3]]}')
    if isinstance(found.get("inputs"), list):
        items = [item for item in found["inputs"] if isinstance(item, dict)]
        return {item["name"]: _array(item.get("data"), item.get("datatype"), item["name"], item) for item in items}
    dtypes = {spec.name: spec.dtype for spec in signature.inputs}
    return {name: _array(value, dtypes.get(name), name, {}) for name, value in found.items()}


def _array(value: Any, datatype: str | None, name: str, item: dict[str, Any]) -> Array:
    """Nested lists as an array of `datatype`, where that is known, and of the shape that `item` states."""
    try:
        array = plain(np.array(value, dtype=numpy_dtype(datatype) if datatype else None))
        shape = item.get("shape", array.shape)
        if array.size != math.prod(shape):
            raise BadInput(f"{array.size} values do not fill shape {shape}")
        return array.reshape(shape)
    except (ValueError, TypeError, OverflowError, BadInput) as fault:
        raise BadInput(f"input {name!r}: {fault}", hint="nested lists of equal lengths") from None


def write(path: Path, tensors: Tensors) -> None:
    """Write tensors as .npz, .npy (one tensor), .safetensors or .json. Raises BadInput for another suffix."""
    check_suffix(path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        folders.write(path, tensorfile.encode(tensors))
    elif suffix == ".json":
        folders.write(path, msgspec.json.encode(as_json(tensors)))
    else:
        plain = {name: _storable(array) for name, array in tensors.items()}
        if suffix == ".npy" and len(plain) != 1:
            raise BadInput(f"{path.name}: {len(plain)} outputs do not fit one .npy file", hint="use .npz")
        buffer = io.BytesIO()
        if suffix == ".npy":
            np.save(buffer, next(iter(plain.values())), allow_pickle=False)
        else:
            np.savez(buffer, **plain)  # type: ignore[arg-type]
        folders.write(path, buffer.getvalue())


def check_suffix(path: Path) -> None:
    """Raise BadInput for a name that `write` knows no format for."""
    if path.suffix.lower() not in (".npz", ".npy", ".safetensors", ".json"):
        raise BadInput(f"{path.name}: unknown suffix", hint="use .npz, .npy, .safetensors or .json")


def _storable(array: Array) -> Array:
    if array.dtype == object:
        return np.array(array.tolist(), dtype=bytes).reshape(array.shape)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def as_json(tensors: Tensors) -> list[dict[str, Any]]:
    """Tensors as the outputs of an answer of the Open Inference Protocol; bytes that are no text are replaced."""
    return [
        {
            "name": name,
            "datatype": dtype_name(array.dtype),
            "shape": list(array.shape),
            "data": encode_json_data(array)
            if array.dtype.kind not in "OSU"
            else [v.decode(errors="replace") if isinstance(v, bytes) else v for v in array.ravel().tolist()],
        }
        for name, array in tensors.items()
    ]
