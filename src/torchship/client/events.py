"""Streams over plain HTTP: a request as the generate extension takes it, and its server-sent events as tensors.

JSON there holds numbers and strings without their shapes: those follow from the model's metadata, where one length at
most is free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from torchship.errors import BadInput, StageFailed, Unsupported
from torchship.tensors import Array
from torchship.wire.json_arrays import decode_json_data, encode_json_data
from torchship.wire.messages import Request, Response

_GRPC = "ask by a grpc:// URL"


def encode_generate(request: Request, *, inputs: Sequence[Mapping[str, Any]]) -> bytes:
    """The JSON of a request. Raises BadInput for an unknown input, Unsupported for a shape that cannot be told."""
    known = {item["name"]: item["shape"] for item in inputs}
    fields: dict[str, Any] = {"parameters": request.parameters} | ({"id": request.id} if request.id else {})
    for name, array in request.inputs.items():
        if name not in known:
            raise BadInput(f"model {request.model!r} has no input {name!r}", hint=f"it has {', '.join(known)}")
        if name in ("id", "parameters") or _shape(known[name], array.size) != list(array.shape):
            raise Unsupported(f"input {name!r} of shape {list(array.shape)} cannot be sent to a stream", hint=_GRPC)
        fields[name] = encode_json_data(array)
    return msgspec.json.encode(fields)


def decode_event(line: bytes, *, outputs: Sequence[Mapping[str, Any]]) -> Response:
    """One answer out of its event. Raises StageFailed with the server's message where it holds an error."""
    try:
        told = msgspec.json.decode(line, type=dict[str, Any])
        if "error" in told:
            raise StageFailed(str(told["error"]))
        found = {item["name"]: _array(item, told[item["name"]]) for item in outputs if item["name"] in told}
        return Response(str(told["model_name"]), str(told.get("model_version", "")), found, str(told.get("id", "")))
    except (msgspec.MsgspecError, BadInput, KeyError) as fault:
        raise StageFailed(f"the server's event cannot be read: {fault}") from None


def _array(item: Mapping[str, Any], value: Any) -> Array:
    items = value if isinstance(value, list) else [value]
    shape = _shape(item["shape"], len(items))
    if shape is None:
        raise Unsupported(f"the shape of output {item['name']!r} cannot be told from an event", hint=_GRPC)
    return decode_json_data(msgspec.json.encode(items), name=item["name"], datatype=item["datatype"], shape=shape)


def _shape(axes: Sequence[int], count: int) -> list[int] | None:
    """The shape of so many elements: the last free axis takes what the others, each of length 1, leave to it."""
    shape = [max(axis, 1) if axis else 0 for axis in axes]
    free = [place for place, axis in enumerate(axes) if axis < 0]
    if free:
        shape[free[-1]] = count // max(1, math.prod(shape))
    return shape if math.prod(shape) == count else None
