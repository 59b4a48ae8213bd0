"""The Open Inference Protocol over gRPC: infer messages to and from ours, the server's side first, then the caller's.

A steady client's request differs from its last one in the raw tensors alone, and those come last in its bytes: what
comes before them is parsed once and then known by its bytes. Anything else goes through protobuf.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from google.protobuf.message import DecodeError

from torchship.errors import BadInput, StageFailed
from torchship.stage import Value
from torchship.tensors import Array, Tensors, bytes_array, dtype_name, numpy_dtype
from torchship.wire import oip_json
from torchship.wire.messages import BatchSlice, RawInputs, RawLayout, Request, Response, layout_of
from torchship.wire.oip_json import Regions
from torchship.wire.raw import LONG, Buffer, decode_raw, element_count, encode_raw, read_varint, varint
from torchship.wire.schema import message

_CONTENTS = {
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
    "BYTES": "bytes_contents",
}
_SMALL = 1 << 16  # bytes of a request whose tensors are copied out of it rather than viewed
_FIELDS = 4096  # of a request that are looked at to find raw tensors
_PIECE = 1 << 16  # elements of a typed field that are read at a time
_RAW_TAG = 0x3A  # raw_input_contents = 7
_TAGS = frozenset((0x0A, 0x12, 0x1A, 0x22, 0x2A, 0x32))


class _Known(NamedTuple):
    """A request without its tensors' bytes; `plain`: they need no look (no BYTES, no BOOL, nothing empty)."""

    request: Request
    datatypes: list[str]
    layout: RawLayout
    plain: bool


class InferCodec:
    """Decodes ModelInferRequest and encodes ModelInferResponse; remembers the shapes of both, within bounds."""

    def __init__(self, *, regions: Regions | None = None) -> None:
        self._regions = regions
        self._asked: dict[bytes, _Known] = {}
        self._told: dict[object, bytes] = {}
        self._request = message("inference.ModelInferRequest")

    def decode(self, data: Buffer, start: int = 0) -> Request:
        """The request in `data` from `start` on; raw tensors are views of it. Raises BadInput."""
        place, size, head_end = start, len(data), -1
        raws: list[tuple[int, int]] = []
        while place < size - 1:
            tag, length = data[place], data[place + 1]
            if tag == _RAW_TAG:
                if head_end < 0:
                    head_end = place
            elif head_end >= 0 or tag not in _TAGS:
                return self._decode_slowly(data[start:])
            place += 2
            if length > 127:
                length, place = read_varint(data, place - 1)
            if tag == _RAW_TAG:
                raws.append((place, place + length))
            place += length
        if place != size or head_end < 0:
            return self._decode_slowly(data[start:])
        key = bytes(data[start:head_end])
        known = self._asked.get(key)
        if known is None or len(known.datatypes) != len(raws):
            return self._decode_slowly(data[start:], key)
        old, layout = known.request, known.layout
        inputs: Tensors
        if not known.plain or [last - first for first, last in raws] != layout.sizes:
            given = zip(layout.names, known.datatypes, layout.shapes, raws, strict=True)
            inputs = {
                name: decode_raw(memoryview(data)[first:last], name=name, datatype=datatype, shape=shape)
                for name, datatype, shape, (first, last) in given
            }
        elif size <= _SMALL:
            inputs = RawInputs(layout, tuple([bytes(data[first:last]) for first, last in raws]))
        else:
            wide = zip(layout.names, layout.dtypes, layout.shapes, raws, strict=True)
            inputs = {name: np.ndarray(shape, dtype, data, first) for name, dtype, shape, (first, _) in wide}
        parameters = dict(old.parameters) if old.parameters else {}
        return Request(old.model, inputs, old.version, old.id, parameters, old.outputs, old.deadline, old.priority)

    @staticmethod
    def slow(data: Buffer, start: int) -> bool:
        """Whether decoding takes long: a large request without raw tensors, its numbers in typed fields."""
        if len(data) <= LONG:
            return False
        place = start
        for _ in range(_FIELDS):
            if place >= len(data):
                break
            if data[place] == _RAW_TAG:
                return False
            length, place = read_varint(data, place + 1)
            place += length
        return True

    def _decode_slowly(self, data: Buffer, key: bytes = b"") -> Request:
        try:
            asked = self._request.FromString(bytes(data))
        except DecodeError as fault:
            raise BadInput(f"not a ModelInferRequest: {fault}") from None
        request = Request(asked.model_name, {}, asked.model_version, asked.id)
        if asked.parameters:
            oip_json.apply_parameters(request, plain_parameters(asked.parameters))
        request.outputs = tuple(
            oip_json.wanted_output(item.name, plain_parameters(item.parameters), binary=True) for item in asked.outputs
        )
        inputs: dict[str, Array] = {}
        raws = list(asked.raw_input_contents)
        plain = bool(raws) and not any(wish.classification for wish in request.outputs)
        for item in asked.inputs:
            if item.name in inputs:
                raise BadInput(f"input {item.name!r} is given twice")
            plain = plain and not item.parameters
            inputs[item.name] = _tensor(item, raws, self._regions)
        if raws:
            raise BadInput(f"{len(raws)} raw contents are left after the last input")
        if plain and 0 < len(key) <= 1024:
            if len(self._asked) >= 512:
                self._asked.clear()
            kept = msgspec.structs.replace(request, parameters=dict(request.parameters))
            datatypes = [item.datatype for item in asked.inputs]
            simple = not {"BYTES", "BOOL"} & {*datatypes} and all(array.size for array in inputs.values())
            self._asked[key] = _Known(kept, datatypes, layout_of(inputs), simple)
        request.inputs = inputs
        return request

    def encode(self, response: Response, request: Request) -> bytes:
        """The bytes of a ModelInferResponse. Raises BadInput for an output that the model does not have."""
        arrays = response.outputs
        if request.outputs:
            top, raws = self._chosen(response, request)
        elif type(arrays) is BatchSlice and arrays.batch.plain and not response.parameters:
            return self._encode_slice(arrays, response)
        else:
            facts = [(name, array.dtype, array.shape) for name, array in arrays.items()]
            key = (response.model, response.version, *facts)
            known = self._told.get(key)
            if known is None:
                known = _answer(response, [(name, array, {}) for name, array in arrays.items()])
                if len(self._told) >= 512:
                    self._told.clear()
                self._told[key] = known
            top, raws = known, [encode_raw(array) for array in arrays.values()]
        parts = [top]
        if response.id:
            parts += _field(b"\x1a", response.id.encode())
        if response.parameters:
            extra = message("inference.ModelInferResponse")()
            set_parameters(extra.parameters, response.parameters)
            parts.append(extra.SerializeToString())
        for raw in raws:
            parts += _field(b"\x32", raw)
        return b"".join(parts)

    @staticmethod
    def _encode_slice(part: BatchSlice, response: Response) -> bytes:
        """The same for a part of a batch: all but the data is remembered, and the data are cut out of the batch's."""
        batch, start, end = part.batch, part.start, part.end
        key = response.model, response.version, end - start
        tops = batch.outline.told.get(key)
        if tops is None:
            top = _answer(response, [(name, array, {}) for name, array in part.items()])
            tops = [b"\x32" + varint(array.nbytes) for array in part.values()]
            tops[0] = top + tops[0]
            batch.outline.keep(key, tops)
        parts: list[bytes] = []
        for top, (raw, step) in zip(tops, batch.raws, strict=True):
            parts += (top, raw[start * step : end * step])
        if response.id:
            parts += _field(b"\x1a", response.id.encode())
        return b"".join(parts)

    def _chosen(self, response: Response, request: Request) -> tuple[bytes, list[bytes]]:
        """The outputs that are asked for, and the contents of each, as Triton has it: empty in shared memory."""
        outputs: list[tuple[str, Array, Mapping[str, Any]]] = []
        raws: list[bytes] = []
        for wish in request.outputs:
            array = oip_json.chosen_output(wish, response)
            raw = encode_raw(array)
            shared = "shared_memory_region" in wish.parameters
            outputs.append((wish.name, array, oip_json.write_region(self._regions, wish, raw) if shared else {}))
            raws.append(b"" if shared else raw)
        return _answer(response, outputs), raws


def _field(tag: bytes, data: bytes) -> tuple[bytes, bytes, bytes]:
    """A field of protobuf that holds bytes."""
    return tag, varint(len(data)), data


def _tensor(item: Any, raws: list[bytes], regions: Regions | None = None) -> Array:
    """A tensor from shared memory, from its typed fields, or from the next of the raw contents."""
    name, datatype, shape = item.name, item.datatype, list(item.shape)
    parameters = plain_parameters(item.parameters) if item.parameters else {}
    if "shared_memory_region" in parameters:
        data = oip_json.read_region(regions, parameters, name=name)
        return decode_raw(data, name=name, datatype=datatype, shape=shape)
    if item.HasField("contents"):
        return typed_contents(item.contents, name=name, datatype=datatype, shape=shape)
    if not raws:
        if element_count(shape, name=name) == 0:
            return np.empty(shape, numpy_dtype(datatype))
        raise BadInput(f"input {name!r} has no data", hint="fill contents, or raw_input_contents for every input")
    return decode_raw(raws.pop(0), name=name, datatype=datatype, shape=shape)


def _answer(response: Response, outputs: Iterable[tuple[str, Array, Mapping[str, Any]]]) -> bytes:
    """Model, version and outputs without their contents."""
    answer = message("inference.ModelInferResponse")(model_name=response.model, model_version=response.version)
    for name, array, parameters in outputs:
        output = answer.outputs.add(name=name, datatype=dtype_name(array.dtype), shape=array.shape)
        set_parameters(output.parameters, parameters)
    return bytes(answer.SerializeToString())


def typed_contents(contents: Any, *, name: str, datatype: str, shape: list[int]) -> Array:
    """A tensor in the typed fields."""
    count = element_count(shape, name=name)
    field = _CONTENTS.get(datatype)
    if field is None:
        numpy_dtype(datatype)  # an unknown one says so
        raise BadInput(f"input {name!r}: {datatype} has no typed contents", hint="use raw_input_contents")
    values = getattr(contents, field)
    if len(values) != count:
        raise BadInput(f"input {name!r} has {len(values)} elements in {field}, expected {count} of {shape}")
    if datatype == "BYTES":
        return bytes_array(list(values)).reshape(shape)
    kind = {"int_contents": np.int32, "uint_contents": np.uint32}.get(field) or numpy_dtype(datatype)
    pieces = [np.array(values[at : at + _PIECE], kind) for at in range(0, count, _PIECE)]  # others get their turn
    wide = np.concatenate(pieces) if pieces else np.empty(0, kind)
    array = wide.astype(numpy_dtype(datatype))
    if wide.dtype.kind in "iu" and (array != wide).any():
        raise BadInput(f"input {name!r}: a value of {field} is out of the range of {datatype}")
    return array.reshape(shape)


def plain_parameters(given: Any) -> dict[str, Value]:
    """An InferParameter map as plain values."""
    found: dict[str, Value] = {}
    for name, parameter in given.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise BadInput(f"parameter {name!r} has no value")
        found[name] = getattr(parameter, choice)
    return found


def set_parameters(target: Any, values: Mapping[str, Any]) -> None:
    """Plain values into an InferParameter map."""
    for name, value in values.items():
        if isinstance(value, bool):
            target[name].bool_param = value
        elif isinstance(value, int):
            target[name].int64_param = value
        elif isinstance(value, float):
            target[name].double_param = value
        else:
            target[name].string_param = str(value)


def encode_request(request: Request) -> bytes:
    """A ModelInferRequest with raw contents."""
    ask = message("inference.ModelInferRequest")(model_name=request.model, model_version=request.version, id=request.id)
    set_parameters(ask.parameters, oip_json.timing_parameters(request))
    for name, array in request.inputs.items():
        ask.inputs.add(name=name, datatype=dtype_name(array.dtype), shape=array.shape)
        ask.raw_input_contents.append(encode_raw(array))
    for wish in request.outputs:
        set_parameters(ask.outputs.add(name=wish.name).parameters, oip_json.wish_parameters(wish))
    return bytes(ask.SerializeToString())


def decode_response(data: Buffer, *, streamed: bool = False) -> Response:
    """A ModelInferResponse, or a ModelStreamInferResponse where `streamed`.

    Raises StageFailed for bytes that are none: the server is at fault; with its message where it tells an error.
    """
    kind = message("inference.ModelStreamInferResponse" if streamed else "inference.ModelInferResponse")
    try:
        answer = kind.FromString(bytes(data))
        if streamed:
            if answer.error_message:
                raise StageFailed(answer.error_message)
            answer = answer.infer_response
        raws = list(answer.raw_output_contents)
        outputs = {item.name: _tensor(item, raws) for item in answer.outputs}
        parameters = plain_parameters(answer.parameters)
    except (DecodeError, BadInput) as fault:
        raise StageFailed(f"the server's answer cannot be read: {fault}") from None
    return Response(answer.model_name, answer.model_version, outputs, answer.id, parameters)
