"""The Open Inference Protocol over HTTP: bodies of JSON with the binary tensor extension, to messages and back.

The server's side first, then the caller's. A steady client's requests differ in their data alone, and only that is read
again: what comes before the data (and after it) is read once in the general way and then known by its bytes. The parser
of JSON is in the same state after the same bytes, so a well-formed value between known bytes makes a known request.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from torchship.errors import BadInput, StageFailed
from torchship.stage import Value
from torchship.tensors import Array, Free, Signature, TensorSpec, bytes_array, dtype_name, numpy_dtype
from torchship.wire.json_arrays import decode_json_data, encode_output, quote_constants
from torchship.wire.messages import BatchSlice, RawInputs, RawLayout, Request, Response, WantedOutput, layout_of
from torchship.wire.raw import LONG, Buffer, decode_raw, encode_raw


class Regions(Protocol):
    """Shared memory that a client has registered: where tensors can lie instead of in the body."""

    def read(self, region: str, *, offset: int, size: int) -> memoryview:
        """The bytes of an input. Raises BadInput for a region or a range that is not registered."""

    def write(self, region: str, data: bytes, *, offset: int, size: int) -> None:
        """Put the bytes of an output there. Raises BadInput when they do not fit."""


class Body(NamedTuple):
    """An encoded answer: `header_length` is the length of its JSON where binary tensors follow, else None."""

    data: bytes
    header_length: int | None


class _Input(msgspec.Struct, gc=False, omit_defaults=True):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    parameters: dict[str, Value] | None = None


class _Wanted(msgspec.Struct, gc=False, omit_defaults=True):
    name: str
    parameters: dict[str, Value] | None = None


class _RequestHead(msgspec.Struct, gc=False, omit_defaults=True):
    inputs: list[_Input]
    id: str = ""
    parameters: dict[str, Value] | None = None
    outputs: list[_Wanted] | None = None


class _Output(msgspec.Struct, gc=False, omit_defaults=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: Any = msgspec.UNSET


class _ResponseHead(msgspec.Struct, gc=False, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[_Output]
    id: str = ""
    parameters: dict[str, Any] | None = None


class _Told(msgspec.Struct, gc=False):
    """An answer as a client reads it: of any server, so that what it need not say may be missing."""

    model_name: str
    outputs: list[_Input]
    model_version: str = ""
    id: str = ""
    parameters: dict[str, Any] | None = None


_QUESTION = msgspec.json.Decoder(_RequestHead)
_TOLD = msgspec.json.Decoder(_Told)
_ANSWER = msgspec.json.Encoder()
_MARK = b'"data":'
_TEMPLATE = 1024  # bytes of what is remembered of a body
_TEMPLATES = 64  # different ones
_FLOATS = msgspec.json.Decoder(list[float]).decode
_WHOLE = msgspec.json.Decoder(list[int]).decode
_CODES = {"e": "e", "f": "f", "d": "d", "b": "b", "B": "B", "h": "h", "H": "H", "i": "i", "I": "I", "l": "q", "L": "Q"}


def decode_request(
    body: Buffer, *, model: str, version: str = "", header_length: int | None = None, regions: Regions | None = None
) -> Request:
    """Read the body of an infer call; arrays of binary tensors are views of `body`.

    `header_length` is the value of `Inference-Header-Content-Length` (None: no such header, the body is all JSON).
    Raises BadInput naming the fault and its place.
    """
    if header_length is None:
        text, rest = body, memoryview(b"")
    else:
        if not 0 < header_length <= len(body):
            raise BadInput(f"Inference-Header-Content-Length is {header_length}, the body has {len(body)} bytes")
        view = memoryview(body)
        text, rest = view[:header_length], view[header_length:]
    try:
        question: _RequestHead = _read(_QUESTION, text)
    except (msgspec.MsgspecError, RecursionError, ValueError) as fault:
        raise BadInput(f"request body: {fault}", hint="see the Open Inference Protocol, or GET /docs") from None
    inputs: dict[str, Array] = {}
    for item in question.inputs:
        if item.name in inputs:
            raise BadInput(f"input {item.name!r} is given twice")
        if item.data is not msgspec.UNSET and item.parameters is None:
            inputs[item.name] = decode_json_data(item.data, name=item.name, datatype=item.datatype, shape=item.shape)
        else:
            inputs[item.name], rest = _input(item, rest, regions)
    if rest:
        raise BadInput(f"{len(rest)} bytes are left after the last binary tensor", hint="check binary_data_size")
    request = Request(model, inputs, version, question.id)
    if question.parameters:
        apply_parameters(request, question.parameters)
    if question.outputs:
        request.outputs = tuple(
            wanted_output(item.name, item.parameters or {}, binary=request.binary) for item in question.outputs
        )
    return request


def _read(decoder: msgspec.json.Decoder[Any], text: Buffer) -> Any:
    """A body, though its numbers may be bare constants as Python and RapidJSON write them. Raises what msgspec does."""
    try:
        return decoder.decode(text)
    except msgspec.DecodeError:
        quoted = quote_constants(text)
        if quoted is not None:
            with suppress(msgspec.MsgspecError, RecursionError, ValueError):
                return decoder.decode(quoted)
        raise


def _input(item: _Input, rest: memoryview, regions: Regions | None) -> tuple[Array, memoryview]:
    """One input that may be JSON, binary or in shared memory; and what is left of the binary data."""
    parameters = item.parameters or {}
    size = parameters.get("binary_data_size")
    region = parameters.get("shared_memory_region")
    if (item.data is not msgspec.UNSET) + (size is not None) + (region is not None) != 1:
        raise BadInput(
            f"input {item.name!r} needs its data exactly once",
            hint="either data, or binary_data_size, or shared_memory_region",
        )
    if item.data is not msgspec.UNSET:
        return decode_json_data(item.data, name=item.name, datatype=item.datatype, shape=item.shape), rest
    if region is not None:
        found = read_region(regions, parameters, name=item.name)
        return decode_raw(found, name=item.name, datatype=item.datatype, shape=item.shape), rest
    if type(size) is not int or not 0 <= size <= len(rest):
        raise BadInput(f"input {item.name!r}: binary_data_size is {size!r}, {len(rest)} bytes of data are left")
    return decode_raw(rest[:size], name=item.name, datatype=item.datatype, shape=item.shape), rest[size:]


def read_region(regions: Regions | None, parameters: Mapping[str, Value], *, name: str) -> bytes:
    """The bytes of an input in shared memory, copied: the client could change them while the model runs."""
    region, size, offset = place_of(parameters, name=name)
    if regions is None:
        raise BadInput(f"input {name!r}: shared memory is off", hint="the server's configuration can enable it")
    return bytes(regions.read(region, offset=offset, size=size))


def place_of(parameters: Mapping[str, Value], *, name: str) -> tuple[str, int, int]:
    """Region, size and offset from the parameters of a tensor."""
    region = parameters.get("shared_memory_region")
    size = parameters.get("shared_memory_byte_size")
    offset = parameters.get("shared_memory_offset", 0)
    if type(region) is not str or type(size) is not int or type(offset) is not int or size < 0 or offset < 0:
        raise BadInput(f"tensor {name!r}: shared memory needs a region, a byte_size and an offset of 0 or more")
    return region, size, offset


def apply_parameters(request: Request, parameters: Mapping[str, Value]) -> None:
    """Sort the parameters of a request: those of the protocol into its fields, the rest for the stages."""
    given = dict(parameters)
    binary = given.pop("binary_data_output", False)
    if type(binary) is not bool:
        raise BadInput(f"parameter binary_data_output is {binary!r}, expected true or false")
    request.binary = binary
    if "timeout" in given:
        request.deadline = _whole(given.pop("timeout"), "timeout", 1 << 53) / 1e6
    if "priority" in given:
        request.priority = _whole(given.pop("priority"), "priority", 1 << 31)
    request.parameters = given


def _whole(value: Value, name: str, top: int) -> int:
    if type(value) is str and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if type(value) is not int or not 0 <= value <= top:
        raise BadInput(f"parameter {name} is {value!r}, expected an integer of 0 or more")
    return value


def wanted_output(name: str, parameters: Mapping[str, Value], *, binary: bool) -> WantedOutput:
    """One output of a request from its parameters. Raises BadInput for a wrong one."""
    given = dict(parameters)
    binary_data = given.pop("binary_data", binary)
    classification = given.pop("classification", 0)
    if type(binary_data) is not bool:
        raise BadInput(f"output {name!r}: binary_data is {binary_data!r}, expected true or false")
    if type(classification) is not int or classification < 0:
        raise BadInput(f"output {name!r}: classification is {classification!r}, expected a number of classes")
    if "shared_memory_region" in given:
        place_of(given, name=name)
    return WantedOutput(name, binary_data, classification, given)


def _only_data(body: bytes) -> bytes | None:
    """The text of the data of the only input of a body of JSON; None where there is not exactly that."""
    try:
        question = _QUESTION.decode(body)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return None
    (item, *others) = question.inputs or (None,)
    if others or item is None or isinstance(item.data, msgspec.UnsetType) or item.parameters is not None:
        return None
    return bytes(item.data)


class _Template(msgspec.Struct, eq=False):
    """A request without its data: of JSON the text after it, its reader and writer; of binary data the cuts."""

    request: Request
    layout: RawLayout
    tail: bytes = b""
    read: Callable[[bytes], list[Any]] = list
    pack: Callable[..., bytes] = bytes
    cuts: tuple[tuple[int, int], ...] = ()
    size: int = 0

    def fill(self, raws: tuple[bytes, ...]) -> Request:
        """The request with this data."""
        old = self.request
        return Request(
            old.model, RawInputs(self.layout, raws), old.version, "", dict(old.parameters), old.outputs, old.deadline,
            old.priority, {}, old.binary,
        )  # fmt: skip


class TemplateCache:
    """The bodies of one model and version; `length` is that of the JSON where binary data follow it, else None."""

    def __init__(self, length: int | None) -> None:
        self._length = length
        self._known: dict[bytes, _Template] = {}

    def read(self, body: bytes) -> Request | None:
        """The request in a body that differs from a known one in its data; None for any other."""
        length = self._length
        if length is not None:
            template = self._known.get(body[:length])
            if template is None or template.size != len(body):
                return None
            return template.fill(tuple([body[start:end] for start, end in template.cuts]))
        start = body.find(_MARK) + 7
        template = self._known.get(body[:start])
        if template is None or len(body) > LONG or not body.endswith(template.tail):
            return None
        try:
            return template.fill((template.pack(*template.read(body[start : len(body) - len(template.tail)])),))
        except (msgspec.MsgspecError, struct.error, OverflowError, RecursionError):
            return None  # the general way tells what is wrong: no list of numbers, too many, too large

    def learn(self, body: bytes, request: Request) -> None:
        """Remember a body that was read in the general way, where only its data can differ the next time."""
        if request.id or len(body) > 64 * _TEMPLATE or any(wish.classification for wish in request.outputs):
            return
        if any(array.dtype.char not in _CODES or not array.size for array in request.inputs.values()):
            return
        layout = layout_of(request.inputs)
        kept = msgspec.structs.replace(request, inputs={})
        found = self._binary(body, kept, layout) if self._length is not None else _text_template(body, kept, layout)
        if found is not None and len(found[0]) + len(found[1].tail) <= _TEMPLATE:
            if len(self._known) >= _TEMPLATES:
                self._known.clear()
            self._known[found[0]] = found[1]

    def _binary(self, body: bytes, request: Request, layout: RawLayout) -> tuple[bytes, _Template] | None:
        """All data follow the JSON, in the order of the inputs."""
        ends = [*accumulate(layout.sizes, initial=self._length or 0)]
        if ends[-1] != len(body):
            return None  # some are in the JSON
        return body[: self._length], _Template(request, layout, cuts=tuple(pairwise(ends)), size=len(body))


def _text_template(body: bytes, request: Request, layout: RawLayout) -> tuple[bytes, _Template] | None:
    """One input, whose data are a flat list of numbers. What is taken for it is tried with other data first."""
    start = body.find(_MARK) + len(_MARK)
    data = _only_data(body)
    if start < len(_MARK) or data is None or len(layout.names) != 1:
        return None
    begin = body.find(data, start)
    tail = body[begin + len(data) :]
    if body[start:begin].strip() or any(_only_data(body[:start] + other + tail) != other for other in (b"[7]", b"[8]")):
        return None
    dtype = layout.dtypes[0]
    packer = struct.Struct(f"<{layout.sizes[0] // dtype.itemsize}{_CODES[dtype.char]}")
    return body[:start], _Template(request, layout, tail, _FLOATS if dtype.kind == "f" else _WHOLE, packer.pack)


def decode_plain(body: Buffer, *, model: str, version: str, inputs: Sequence[TensorSpec]) -> Request:
    """A request whose body is nothing but the bytes of the model's only input, one row (a picture, a raw tensor).

    Raises BadInput when the model has several inputs or the bytes do not fit.
    """
    if len(inputs) != 1:
        raise BadInput(f"a body without JSON needs a model with one input, {model!r} has {len(inputs)}")
    (spec,) = inputs
    shape = [axis if isinstance(axis, int) else 1 for axis in spec.shape]
    if spec.dtype == "BYTES":
        if any(length != 1 for length in shape):
            raise BadInput(f"a body without JSON is one element, input {spec.name!r} is {spec}")
        return Request(model, {spec.name: bytes_array([bytes(body)]).reshape(shape)}, version)
    free = [place for place, axis in enumerate(spec.shape) if isinstance(axis, Free) and place > 0]
    if len(free) == 1:  # its length follows from the number of bytes
        one = math.prod(shape) * numpy_dtype(spec.dtype).itemsize
        shape[free[0]] = len(body) // one if one else 0
    array = decode_raw(body, name=spec.name, datatype=spec.dtype, shape=shape)
    return Request(model, {spec.name: array}, version, binary=True)


def encode_response(response: Response, request: Request, *, regions: Regions | None = None) -> Body:
    """The body of an answer, with the outputs in the order and encoding that the request asks for.

    Raises BadInput when the request names an output that the model does not have.
    """
    if (body := encode_slice(response, request)) is not None:
        return body
    outputs: list[_Output] = []
    blobs: list[bytes] = []
    if request.outputs or request.binary:
        wishes = request.outputs or [WantedOutput(name, binary=request.binary) for name in response.outputs]
        for wish in wishes:
            outputs.append(_output(wish, response, blobs, regions))
    else:
        for name, array in response.outputs.items():
            data = encode_output(array)
            outputs.append(_Output(name, dtype_name(array.dtype), list(array.shape), None, data))
    answer = _ResponseHead(response.model, response.version, outputs, response.id, response.parameters or None)
    text = _ANSWER.encode(answer)
    if not blobs and not any(wish.binary for wish in request.outputs):
        return Body(text, None)
    return Body(b"".join([text, *blobs]), len(text))


def is_long(response: Response, request: Request) -> bool:
    """Whether so many numbers will be JSON that others should not wait for it.

    Never where outputs go into shared memory: they are written before their regions are let go.
    """
    part, wishes = response.outputs, request.outputs
    if (type(part) is BatchSlice and not part.batch.long) or (request.binary and not wishes):
        return False
    if any("shared_memory_region" in wish.parameters for wish in wishes):
        return False
    names = [wish.name for wish in wishes if not wish.binary and wish.name in part] if wishes else part
    return sum([part[name].nbytes for name in names]) > LONG


def encode_slice(response: Response, request: Request) -> Body | None:
    """The same for a part of a batch: the text is remembered but for the data, which are cut out of the batch's.

    None for what is not a part of a batch of numbers, is long as text, or is asked for output by output.
    """
    part, binary = response.outputs, request.binary
    if type(part) is not BatchSlice or request.outputs or response.parameters:
        return None
    batch, start, end = part.batch, part.start, part.end
    if not batch.plain or (batch.long and not binary):
        return None
    if end - start == 1 and not (binary or response.id) and len(batch.arrays) == 1:
        return Body(_bodies(part, response)[start], None)
    key = response.model, response.version, end - start, binary
    befores, last = batch.outline.told.get(key) or _keep(key, part, response)
    if response.id:
        last = b'%b,"id":%b}' % (last[:-1], _ANSWER.encode(response.id))
    if binary:
        return Body(b"".join([last, *[raw[start * step : end * step] for raw, step in batch.raws]]), len(last))
    parts: list[bytes] = []
    for before, rows in zip(befores, batch.texts, strict=True):
        parts += (before, rows[start] if end - start == 1 else b",".join(rows[start:end]))
    parts.append(last)
    return Body(b"".join(parts), None)


def _bodies(part: BatchSlice, response: Response) -> list[bytes]:
    """The bodies for all rows of a batch with one output, as if each were asked for alone."""
    batch = part.batch
    made = batch.bodies
    if made is None or made[0] != response.model or made[1] != response.version:
        key = response.model, response.version, 1, False
        (before,), last = batch.outline.told.get(key) or _keep(key, part, response)
        cut = b"\0"  # which JSON does not hold
        text = cut.join(batch.texts[0]).replace(cut, last + cut + before)
        made = batch.bodies = response.model, response.version, (before + text + last).split(cut)
    return made[2]


def _keep(key: tuple[str, str, int, bool], part: BatchSlice, response: Response) -> tuple[list[bytes], bytes]:
    """The text of an answer before each output's data, and after the last."""
    outputs = []
    for name, array in part.items():
        sizes = {"binary_data_size": array.nbytes} if key[-1] else None
        data: Any = msgspec.UNSET if key[-1] else []
        outputs.append(_Output(name, dtype_name(array.dtype), list(array.shape), sizes, data))
    *befores, last = _ANSWER.encode(_ResponseHead(response.model, response.version, outputs)).split(b"[]")
    if not key[-1]:
        befores = [before + b"[" if index == 0 else b"]" + before + b"[" for index, before in enumerate(befores)]
        last = b"]" + last
    part.batch.outline.keep(key, (befores, last))
    return befores, last


def _output(wish: WantedOutput, response: Response, blobs: list[bytes], regions: Regions | None) -> _Output:
    array = chosen_output(wish, response)
    output = _Output(wish.name, dtype_name(array.dtype), list(array.shape))
    if "shared_memory_region" in wish.parameters:
        # Triton's C++ client looks for a size of binary data wherever an output has parameters
        output.parameters = {**write_region(regions, wish, encode_raw(array)), "binary_data_size": 0}
    elif wish.binary:
        blobs.append(encode_raw(array))
        output.parameters = {"binary_data_size": len(blobs[-1])}
    else:
        output.data = encode_output(array)
    return output


def chosen_output(wish: WantedOutput, response: Response) -> Array:
    """The array that answers one wish, turned into classes where asked for."""
    try:
        array = response.outputs[wish.name]
    except KeyError:
        hint = f"the outputs are {', '.join(response.outputs)}"
        raise BadInput(f"model {response.model!r} has no output {wish.name!r}", hint=hint) from None
    return classify(array, top=wish.classification, labels=wish.labels) if wish.classification else array


def write_region(regions: Regions | None, wish: WantedOutput, data: bytes) -> dict[str, Any]:
    """Put an output into the client's shared memory; the parameters that tell it where."""
    region, size, offset = place_of(wish.parameters, name=wish.name)
    if regions is None:
        raise BadInput(f"output {wish.name!r}: shared memory is off", hint="the server's configuration can enable it")
    regions.write(region, data, offset=offset, size=size)
    place: dict[str, Any] = {"shared_memory_region": region, "shared_memory_byte_size": len(data)}
    if offset:
        place["shared_memory_offset"] = offset
    return place


def classify(array: Array, *, top: int, labels: Sequence[str] = ()) -> Array:
    """The `top` largest values of each row as BYTES `value:index[:label]` of shape [rows, top], largest first.

    An output of one axis is one row and keeps it. Source: Triton's classification extension. Raises BadInput for an
    output that holds no numbers.
    """
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise BadInput("only an output of numbers can be asked for as classes")
    rows = array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)
    if array.dtype.name == "bfloat16":
        rows = rows.astype(np.float32)
    top = min(top, rows.shape[1])
    order = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :top]
    texts = [
        _class(row[index], int(index), labels).encode()
        for row, places in zip(rows, order, strict=True)
        for index in places
    ]
    shape = (rows.shape[0], top) if array.ndim > 1 else (top,)
    return bytes_array(texts).reshape(shape)


def _class(value: np.generic, index: int, labels: Sequence[str]) -> str:
    number = f"{float(value.item()):f}" if value.dtype.kind == "f" else f"{value.item()}"
    label = labels[index] if index < len(labels) else ""
    return f"{number}:{index}:{label}" if label else f"{number}:{index}"


def encode_request(request: Request) -> Body:
    """A request as JSON with binary tensors behind it; the outputs are asked for in binary too."""
    inputs, blobs = [], []
    for name, array in request.inputs.items():
        blobs.append(encode_raw(array))
        sizes: dict[str, Value] = {"binary_data_size": len(blobs[-1])}
        inputs.append(_Input(name, list(array.shape), dtype_name(array.dtype), parameters=sizes))
    wanted = [_Wanted(wish.name, {**wish_parameters(wish), "binary_data": True}) for wish in request.outputs]
    parameters = {**timing_parameters(request), "binary_data_output": True}
    text = _ANSWER.encode(_RequestHead(inputs, request.id, parameters, wanted or None))
    return Body(b"".join([text, *blobs]), len(text))


def timing_parameters(request: Request) -> dict[str, Value]:
    """The parameters of a request as it is sent, those of the protocol among them."""
    found: dict[str, Value] = dict(request.parameters)
    if request.deadline:
        found["timeout"] = max(1, round(request.deadline * 1e6))
    if request.priority:
        found["priority"] = request.priority
    return found


def wish_parameters(wish: WantedOutput) -> dict[str, Value]:
    """The parameters of an output that is asked for."""
    return {**wish.parameters, **({"classification": wish.classification} if wish.classification else {})}


def decode_response(body: Buffer, *, header_length: int | None) -> Response:
    """The answer to an infer call. Raises StageFailed for a body that is none: the server is at fault."""
    view = memoryview(body)
    text, rest = (view, view[:0]) if header_length is None else (view[:header_length], view[header_length:])
    try:
        answer: _Told = _read(_TOLD, text)
        outputs: dict[str, Array] = {}
        for item in answer.outputs:
            outputs[item.name], rest = _input(item, rest, None)
    except (msgspec.MsgspecError, BadInput, ValueError, TypeError) as fault:
        raise StageFailed(f"the server's answer cannot be read: {fault}") from None
    return Response(answer.model_name, answer.model_version, outputs, answer.id, answer.parameters or {})


def signature_of(metadata: Mapping[str, Any]) -> Signature:
    """The signature in a model's metadata: batched where every tensor's first axis is free.

    Raises StageFailed for what is no metadata: the server is at fault.
    """
    try:
        inputs, outputs = (
            tuple(
                TensorSpec(item["name"], item["datatype"], tuple(n if n >= 0 else Free() for n in item["shape"]))
                for item in metadata.get(side, ())
            )
            for side in ("inputs", "outputs")
        )
    except (KeyError, TypeError) as fault:
        raise StageFailed(f"the server's metadata cannot be read: {fault!r}") from None
    free = [bool(spec.shape) and isinstance(spec.shape[0], Free) for spec in (*inputs, *outputs)]
    return Signature(inputs, outputs, batched=bool(free) and all(free))
