"""The caller's side of the Open Inference Protocol: requests to bytes, answers to messages, over HTTP and gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from google.protobuf.message import DecodeError

from torchship.errors import BadInput, StageFailed
from torchship.stage import Value
from torchship.tensors import Array, dtype_name
from torchship.wire.json_arrays import decode_json_data
from torchship.wire.messages import Request, Response
from torchship.wire.oip_grpc import plain_parameters, set_parameters, typed_contents
from torchship.wire.oip_json import Body
from torchship.wire.raw import Buffer, decode_raw, encode_raw
from torchship.wire.schema import message


class _Output(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    parameters: dict[str, Any] | None = None


class _Answer(msgspec.Struct):
    model_name: str
    outputs: list[_Output]
    model_version: str = ""
    id: str = ""
    parameters: dict[str, Any] | None = None


_ANSWER = msgspec.json.Decoder(_Answer)


def encode_http(request: Request) -> Body:
    """A request as JSON with binary tensors behind it; the outputs are asked for in binary too."""
    inputs, blobs = [], []
    for name, array in request.inputs.items():
        blobs.append(encode_raw(np.asarray(array)))
        tensor = {"name": name, "shape": list(array.shape), "datatype": dtype_name(array.dtype)}
        inputs.append({**tensor, "parameters": {"binary_data_size": len(blobs[-1])}})
    parameters: dict[str, Value] = {**_timing(request), "binary_data_output": True}
    question: dict[str, Any] = {"inputs": inputs, "parameters": parameters}
    if request.id:
        question["id"] = request.id
    if request.outputs:
        question["outputs"] = [
            {"name": wish.name, "parameters": _wish(wish.parameters, wish.classification, binary=True)}
            for wish in request.outputs
        ]
    text = msgspec.json.encode(question)
    return Body(b"".join([text, *blobs]), len(text))


def _timing(request: Request) -> dict[str, Value]:
    found: dict[str, Value] = dict(request.parameters)
    if request.deadline:
        found["timeout"] = max(1, round(request.deadline * 1e6))
    if request.priority:
        found["priority"] = request.priority
    return found


def _wish(parameters: Mapping[str, Value], classification: int, *, binary: bool = False) -> dict[str, Value]:
    found: dict[str, Value] = {**parameters, **({"binary_data": True} if binary else {})}
    if classification:
        found["classification"] = classification
    return found


def decode_http(body: Buffer, *, header_length: int | None) -> Response:
    """The answer to an infer call. Raises StageFailed for a body that is none: the server is at fault."""
    view = memoryview(body)
    text, rest = (view, view[:0]) if header_length is None else (view[:header_length], view[header_length:])
    try:
        answer = _ANSWER.decode(text)
        outputs: dict[str, Array] = {}
        for item in answer.outputs:
            size = (item.parameters or {}).get("binary_data_size")
            about: dict[str, Any] = {"name": item.name, "datatype": item.datatype, "shape": item.shape}
            if size is None and item.data is not msgspec.UNSET:
                outputs[item.name] = decode_json_data(item.data, **about)
            else:
                outputs[item.name] = decode_raw(rest[: size or 0], **about)
                rest = rest[size or 0 :]
    except (msgspec.MsgspecError, BadInput, ValueError, TypeError) as fault:
        raise StageFailed(f"the server's answer cannot be read: {fault}") from None
    return Response(answer.model_name, answer.model_version, outputs, answer.id, answer.parameters or {})


def encode_grpc(request: Request) -> bytes:
    """A ModelInferRequest with raw contents."""
    ask = message("inference.ModelInferRequest")(model_name=request.model, model_version=request.version, id=request.id)
    set_parameters(ask.parameters, _timing(request))
    for name, array in request.inputs.items():
        ask.inputs.add(name=name, datatype=dtype_name(array.dtype), shape=array.shape)
        ask.raw_input_contents.append(encode_raw(np.asarray(array)))
    for wish in request.outputs:
        output = ask.outputs.add(name=wish.name)
        set_parameters(output.parameters, _wish(wish.parameters, wish.classification))
    data: bytes = ask.SerializeToString()
    return data


def decode_grpc(data: Buffer) -> Response:
    """A ModelInferResponse. Raises StageFailed for bytes that are none: the server is at fault."""
    try:
        answer = message("inference.ModelInferResponse").FromString(bytes(data))
    except DecodeError as fault:
        raise StageFailed(f"the server's answer cannot be read: {fault}") from None
    return response_of(answer)


def decode_grpc_stream(data: Buffer) -> Response:
    """A ModelStreamInferResponse. Raises StageFailed with the server's message where it holds an error."""
    try:
        answer = message("inference.ModelStreamInferResponse").FromString(bytes(data))
    except DecodeError as fault:
        raise StageFailed(f"the server's answer cannot be read: {fault}") from None
    if answer.error_message:
        raise StageFailed(answer.error_message)
    return response_of(answer.infer_response)


def response_of(answer: Any) -> Response:
    """A ModelInferResponse as our own message."""
    outputs: dict[str, Array] = {}
    raws = list(answer.raw_output_contents)
    try:
        for item in answer.outputs:
            about = {"name": item.name, "datatype": item.datatype, "shape": list(item.shape)}
            if item.HasField("contents"):
                outputs[item.name] = typed_contents(item.contents, **about)
            else:
                outputs[item.name] = decode_raw(raws.pop(0), **about)
    except (BadInput, IndexError) as fault:
        raise StageFailed(f"the server's answer cannot be read: {fault}") from None
    return Response(answer.model_name, answer.model_version, outputs, answer.id, plain_parameters(answer.parameters))
