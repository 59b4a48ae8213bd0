"""What goes over the wire comes back as it was, and no bytes whatever crash a decoder."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchship.errors import BadInput
from torchship.tensors import Array, bytes_array, dtype_name
from torchship.wire.json_arrays import decode_json_data, quote_constants
from torchship.wire.messages import Request, Response
from torchship.wire.oip_json import decode_request, encode_response
from torchship.wire.raw import decode_raw, encode_raw

_CALM = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
_PLAIN = ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]
_SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)


@st.composite
def arrays(draw: st.DrawFn, *, text: bool = False) -> Array:
    kind = draw(st.sampled_from([*_PLAIN, "bf16", "bytes"]))
    shape = draw(_SHAPES)
    if kind == "bytes":
        item = st.text().map(str.encode) if text else st.binary(max_size=9)
        count = int(np.prod(shape))
        return bytes_array(draw(st.lists(item, min_size=count, max_size=count))).reshape(shape)
    if kind == "bf16":
        return draw(hnp.arrays(np.float32, shape, elements=st.integers(-256, 256))).astype(ml_dtypes.bfloat16)
    return draw(hnp.arrays(np.dtype(kind), shape))


def _same(left: Array, right: Array) -> bool:
    alike = left.dtype == right.dtype and left.shape == right.shape
    return alike and str(left.tolist()) == str(right.tolist())  # NaN is not itself, but is spelt as itself


@_CALM
@given(arrays())
def test_raw_round_trip(array: Array) -> None:
    datatype = "BYTES" if array.dtype.kind == "O" else dtype_name(array.dtype)
    back = decode_raw(encode_raw(array), name="x", datatype=datatype, shape=array.shape)
    assert _same(back, array)


@_CALM
@given(arrays(text=True), st.booleans())
def test_json_round_trip(array: Array, nested: bool) -> None:
    if array.dtype.kind == "O":
        values: Any = np.array([item.decode() for item in array.ravel()], np.object_).reshape(array.shape)
        datatype = "BYTES"
    else:
        values, datatype = array, dtype_name(array.dtype)
    nested = nested and array.size > 0
    text = json.dumps(values.tolist() if nested else values.ravel().tolist()).encode()
    back = decode_json_data(quote_constants(text) or text, name="x", datatype=datatype, shape=array.shape)
    assert _same(back, array)


@_CALM
@given(arrays(), st.text(max_size=5))
def test_an_answer_can_be_read_as_a_request(array: Array, name: str) -> None:
    request = Request("m", {}, binary=True)
    data, length = encode_response(Response("m", "1", {name: array}), request)
    assert length is not None
    head = json.loads(data[:length])
    head["inputs"] = head.pop("outputs")
    text = json.dumps(head).encode()
    back = decode_request(text + data[length:], model="m", header_length=len(text))
    assert _same(back.inputs[name], array)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["inputs", "name", "shape", "datatype", "data", "parameters", "outputs", "binary_data_size"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)
_INPUT = st.fixed_dictionaries(
    {
        "name": st.text(max_size=3),
        "shape": st.lists(st.integers(-2, 4) | st.integers(), max_size=4),
        "datatype": st.sampled_from(["FP32", "INT8", "UINT64", "BYTES", "BOOL", "BF16", "FP16", "x"]),
    },
    optional={"data": _JSON, "parameters": _JSON},
)


@settings(_CALM, max_examples=300)
@given(
    st.one_of(
        st.binary(max_size=60),
        _JSON.map(lambda value: json.dumps(value).encode()),
        st.lists(_INPUT, max_size=2).map(lambda items: json.dumps({"inputs": items}).encode()),
    ),
    st.binary(max_size=20),
    st.none() | st.integers(-2, 100),
)
def test_no_bytes_crash_the_decoder(text: bytes, rest: bytes, length: int | None) -> None:
    length = len(text) if length is not None and length > 50 else length
    with suppress(BadInput):
        assert decode_request(text + rest, model="m", header_length=length).model == "m"
