"""The asking side of the Open Inference Protocol over gRPC: requests to bytes, answers and metadata to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from torchship.errors import StageFailed
from torchship.stage import Value
from torchship.tensors import Array, Axis, Free, Signature, Tensors, TensorSpec, numpy_dtype
from torchship.wire.oip_grpc import set_parameters
from torchship.wire.raw import datatype_of, decode_raw, encode_raw, object_array
from torchship.wire.schema import message

_FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


def encode_request(
    model: str, tensors: Tensors, *, version: str = "", parameters: Mapping[str, Value] = {}, id: str = ""
) -> bytes:
    """The bytes of a ModelInferRequest with raw contents."""
    asked = message("inference.ModelInferRequest")(model_name=model, model_version=version, id=id)
    set_parameters(asked.parameters, parameters)
    for name, array in tensors.items():
        asked.inputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        asked.raw_input_contents.append(encode_raw(array))
    data: bytes = asked.SerializeToString()
    return data


def decode_response(data: bytes) -> dict[str, Array]:
    """The outputs in a ModelInferResponse. Raises StageFailed for an answer that holds no such thing."""
    try:
        answer = message("inference.ModelInferResponse").FromString(data)
        raws = list(answer.raw_output_contents)
        if raws and len(raws) != len(answer.outputs):
            raise StageFailed(f"the answer has {len(answer.outputs)} outputs and {len(raws)} contents")
        return {item.name: _array(item, raws[i] if raws else None) for i, item in enumerate(answer.outputs)}
    except DecodeError as fault:
        raise StageFailed(f"the answer is no ModelInferResponse: {fault}") from None


def _array(item: Any, raw: bytes | None) -> Array:
    shape = list(item.shape)
    if raw is not None:
        return decode_raw(raw, name=item.name, datatype=item.datatype, shape=shape)
    if item.datatype == "BYTES":
        return object_array(list(item.contents.bytes_contents)).reshape(shape)
    values = getattr(item.contents, _FIELDS.get(item.datatype, ""), None)
    if values is None or len(values) != int(np.prod(shape)):
        raise StageFailed(f"output {item.name!r} holds no {item.datatype} of shape {shape}")
    return np.array(values, numpy_dtype(item.datatype)).reshape(shape)


def decode_metadata(data: bytes) -> Signature:
    """The signature in a ModelMetadataResponse: batched where every tensor's first axis is free."""
    answer = message("inference.ModelMetadataResponse").FromString(data)
    inputs, outputs = (tuple(map(_spec, side)) for side in (answer.inputs, answer.outputs))
    free = [bool(spec.shape) and isinstance(spec.shape[0], Free) for spec in (*inputs, *outputs)]
    return Signature(inputs, outputs, batched=bool(free) and all(free))


def _spec(item: Any) -> TensorSpec:
    shape: tuple[Axis, ...] = tuple(axis if axis >= 0 else Free() for axis in item.shape)
    return TensorSpec(item.name, item.datatype, shape)
