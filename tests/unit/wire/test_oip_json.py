"""Bodies of infer calls: every datatype, every encoding, and every way to get one wrong."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest

from torchship.errors import BadInput
from torchship.tensors import Signature, TensorSpec, bytes_array
from torchship.wire.messages import Batch, BatchSlice, Outline, Request, Response, WantedOutput
from torchship.wire.oip_json import decode_plain, decode_request, decode_response, encode_response, is_long
from torchship.wire.raw import encode_raw


def body(datatype: str, shape: list[int], data: object, **extra: object) -> bytes:
    return json.dumps({"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "data": data}], **extra}).encode()


def decode(data: bytes, **options: Any) -> Request:
    return decode_request(data, model="m", **options)


@pytest.mark.parametrize("data", [[1, 2.5, 3, 4, 5, 6], [[1, 2.5, 3], [4, 5, 6]]])
def test_numbers_flat_or_nested(data: object) -> None:
    array = decode(body("FP32", [2, 3], data)).inputs["x"]
    assert array.dtype == np.float32
    assert array.tolist() == [[1, 2.5, 3], [4, 5, 6]]


def test_nested_with_spaces() -> None:
    text = b'{"inputs":[{"name":"x","shape":[2,1],"datatype":"INT8","data": [ \n [ 1 ], [-2]]}]}'
    assert decode(text).inputs["x"].tolist() == [[1], [-2]]


def test_strings_nested_and_flat() -> None:
    assert decode(body("BYTES", [2, 1], ["é", "b"])).inputs["x"].tolist() == [["é".encode()], [b"b"]]
    assert decode(body("BYTES", [2, 1], [["a"], ["b"]])).inputs["x"].tolist() == [[b"a"], [b"b"]]


def test_booleans_and_their_numbers() -> None:
    assert decode(body("BOOL", [3], [True, 0, 1])).inputs["x"].tolist() == [True, False, True]


NOT_FINITE = [1.5, float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
@pytest.mark.parametrize("nested", [False, True])
def test_what_is_not_finite_goes_both_ways(datatype: str, nested: bool) -> None:
    """As strings in valid JSON, and as the bare constants that Python's json and RapidJSON write."""
    for values in (NOT_FINITE, [1.5, "NaN", "Infinity", "-Infinity"]):
        found = decode(body(datatype, [2, 2], [values[:2], values[2:]] if nested else values)).inputs["x"]
        assert str(found.ravel().tolist()) == "[1.5, nan, inf, -inf]"
        assert found.shape == (2, 2)
    array = np.array(NOT_FINITE).astype(found.dtype).reshape(2, 2)
    told = encode_response(Response("m", "1", {"x": array}), Request("m", {}))
    assert json.loads(told.data)["outputs"][0]["data"] == [1.5, "NaN", "Infinity", "-Infinity"]
    batch = Batch(Outline(("x",)), [array])
    for row in range(2):
        part = Response("m", "1", BatchSlice(batch, row, row + 1))
        plain = Response("m", "1", {"x": array[row : row + 1]})
        assert encode_response(part, Request("m", {})) == encode_response(plain, Request("m", {}))
    back = decode_response(told.data, header_length=None)
    assert back.outputs["x"].tobytes() == array.tobytes()
    bare = decode_response(told.data.replace(b'"NaN"', b"NaN").replace(b'"Infinity"', b"Infinity"), header_length=None)
    assert bare.outputs["x"].tobytes() == array.tobytes()


@pytest.mark.parametrize("text", [b"[nan]", b"[NaNs]", b'["nan"]', b'["inf"]', b'["+Infinity"]', b"[-NaN]", b"[null]"])
def test_other_words_are_no_numbers(text: bytes) -> None:
    with pytest.raises(BadInput):
        decode(b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":%b}]}' % text)


def test_constants_inside_of_strings_stay() -> None:
    assert decode(body("BYTES", [1], ['a "NaN", NaN \\'], id="NaN")).inputs["x"].tolist() == [b'a "NaN", NaN \\']
    mixed = b'{"id":"\\"NaN","inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[NaN]}]}'
    assert decode(mixed).id == '"NaN'
    with pytest.raises(BadInput, match=r"malformed|truncated"):
        decode(b'{"id":"' + b'\\"NaN' * 200_000)
    with pytest.raises(BadInput, match="INT8"):
        decode(body("INT8", [1], ["NaN"]))


def test_wide_integers_stay_exact() -> None:
    assert decode(body("UINT64", [1], [2**64 - 1])).inputs["x"][0] == 2**64 - 1
    assert decode(body("INT64", [1], [-(2**63)])).inputs["x"][0] == -(2**63)


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "says"),
    [
        ("FP32", [2], [1, "2"], r"data\[1\]"),
        ("FP32", [2], [1, None], "null"),
        ("FP32", [1], [True], "bool"),
        ("FP32", [1], [1e39], "<="),
        ("FP16", [1], [70000], "<="),
        ("FP64", [3], [1, 2], "2 elements, expected 3"),
        ("INT8", [1], [128], "127"),
        ("INT32", [1], [1.5], "float"),
        ("UINT64", [1], [-1], "out of range"),
        ("INT64", [1], [2**63], "out of range"),
        ("BOOL", [1], [2], "<= 1"),
        ("BYTES", [1], [3], "str"),
        ("FP32", [2, 2], [[1, 2], [3]], "differ in their length"),
        ("BYTES", [2, 2], [["a", "b"], ["c"]], "differ in their length"),
        ("FP32", [3, 2], [[1, 2, 3], [4, 5, 6]], "shape"),
        ("FP32", [-1], [1], "lengths are 0 or more|shape"),
        ("FP99", [1], [1], "unknown datatype"),
        ("FP32", [1] * 40, [1], "axes"),
        ("FP32", [1], {"a": 1}, "array"),
    ],
)
def test_refused_with_a_reason(datatype: str, shape: list[int], data: object, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        decode(body(datatype, shape, data))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b"[]", "object"),
        (b"{}", "inputs"),
        (b'{"inputs":[{"name":"x"}]}', "shape"),
        (b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32"}]}', "exactly once"),
        (b'{"inputs":' + b"[" * 100_000, "array"),
        (
            b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":' + b"[" * 9_000,
            "malformed|truncated|deep|depth",
        ),
        (b'{"inputs":[],"id":3}', "id"),
        (b"\xff\xfe", "malformed"),
    ],
)
def test_malformed_bodies(text: bytes, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        decode(text)


def test_an_input_twice() -> None:
    one = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}
    with pytest.raises(BadInput, match="twice"):
        decode(json.dumps({"inputs": [one, one]}).encode())


def binary(head: dict[str, Any], *blobs: bytes) -> tuple[bytes, int]:
    text = json.dumps(head).encode()
    return text + b"".join(blobs), len(text)


def test_binary_tensors_are_views() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    words = bytes_array([b"a", b"\x00\xff"])
    data, length = binary(
        {
            "inputs": [
                {"name": "x", "shape": [2, 3], "datatype": "FP32", "parameters": {"binary_data_size": 24}},
                {"name": "w", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": 11}},
                {"name": "j", "shape": [1], "datatype": "INT8", "data": [5]},
            ],
            "parameters": {"binary_data_output": True, "timeout": 5000, "priority": 2, "threshold": 0.5},
            "outputs": [{"name": "a"}, {"name": "b", "parameters": {"binary_data": False, "classification": 3}}],
        },
        values.tobytes(),
        encode_raw(words),
    )
    request = decode(data, header_length=length)
    assert (request.inputs["x"] == values).all()
    assert request.inputs["x"].base is not None
    assert request.inputs["w"].tolist() == [b"a", b"\x00\xff"]
    assert request.inputs["j"].tolist() == [5]
    assert request.deadline == 0.005
    assert request.priority == 2
    assert request.parameters == {"threshold": 0.5}
    assert request.outputs == (WantedOutput("a", True), WantedOutput("b", False, 3))


@pytest.mark.parametrize(
    ("size", "blob", "says"),
    [
        (8, b"1234", "4 bytes of data are left"),
        (8, b"123456789", "left after"),
        (4, b"1234", "expected 8"),
        (-1, b"", "-1"),
    ],
)
def test_binary_sizes_that_do_not_fit(size: int, blob: bytes, says: str) -> None:
    item = {"name": "x", "shape": [2], "datatype": "FP32", "parameters": {"binary_data_size": size}}
    data, length = binary({"inputs": [item]}, blob)
    with pytest.raises(BadInput, match=says):
        decode(data, header_length=length)


def test_header_length_beyond_the_body() -> None:
    with pytest.raises(BadInput, match="has 2 bytes"):
        decode(b"{}", header_length=3)


@pytest.mark.parametrize("blob", [b"\x05\0\0\0abc", b"\0\0", b"\x01\0\0\0ab"])
def test_strings_that_lie_about_their_length(blob: bytes) -> None:
    item = {"name": "x", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(blob)}}
    data, length = binary({"inputs": [item]}, blob)
    with pytest.raises(BadInput, match=r"BYTES element|element 0|after its"):
        decode(data, header_length=length)


def test_shared_memory_is_refused_when_off() -> None:
    item: dict[str, Any] = {"name": "x", "shape": [1], "datatype": "FP32"}
    item["parameters"] = {"shared_memory_region": "r", "shared_memory_byte_size": 4}
    with pytest.raises(BadInput, match="shared memory is off"):
        decode(json.dumps({"inputs": [item]}).encode())


def specs(text: str) -> list[TensorSpec]:
    return list(Signature.parse(f"{text} -> y:FP32[1]", batched=False).inputs)


def test_plain_bodies() -> None:
    picture = decode_plain(b"\xff\xd8", model="m", version="", inputs=specs("image:BYTES[-1,1]"))
    assert picture.inputs["image"].tolist() == [[b"\xff\xd8"]]
    numbers = decode_plain(bytes(24), model="m", version="", inputs=specs("x:FP32[-1,2,-1]"))
    assert numbers.inputs["x"].shape == (1, 2, 3)
    with pytest.raises(BadInput, match="one input"):
        decode_plain(b"", model="m", version="", inputs=specs("a:FP32[1], b:FP32[1]"))
    with pytest.raises(BadInput, match="expected 4"):
        decode_plain(b"12", model="m", version="", inputs=specs("a:FP32[1]"))


def answer(array: Any, *wishes: WantedOutput, whole_binary: bool = False) -> tuple[dict[str, Any], bytes]:
    request = Request("m", {}, outputs=wishes, binary=whole_binary)
    data, length = encode_response(Response("m", "1", {"y": array}, "id7"), request)
    return json.loads(data[:length]), data[length:] if length else b""


def test_answers_in_json() -> None:
    head, rest = answer(np.array([[1.5, np.nan]], np.float32))
    assert head == {
        "model_name": "m",
        "model_version": "1",
        "id": "id7",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.5, "NaN"]}],
    }
    assert rest == b""


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", ["f4", "f8", "i8", "?", "O"])
def test_a_long_answer_in_pieces_is_the_same(rows: int, dtype: str) -> None:
    """More than 1 MiB is written piece by piece, one answer or a part of a batch; what is not finite among the rest."""
    count = 1_200_000 // rows
    array: Any = (np.arange(rows * count) % 1009 - 500).reshape(rows, count)
    array = (
        np.char.mod("n\u00e9%d", array[:, : 200_000 // rows]).astype(object) if dtype == "O" else array.astype(dtype)
    )
    if dtype == "f4":
        array[-1, -1], array[0, 70_000] = np.nan, -np.inf
    flat = array.ravel().tolist()
    if dtype == "f4":
        flat[-1], flat[70_000] = "NaN", "-Infinity"
    datatype = {"f4": "FP32", "f8": "FP64", "i8": "INT64", "?": "BOOL", "O": "BYTES"}[dtype]
    output = {"name": "y", "datatype": datatype, "shape": [*array.shape], "data": flat}
    direct = msgspec.json.encode({"model_name": "m", "model_version": "1", "outputs": [output]})
    assert encode_response(Response("m", "1", {"y": array}), Request("m", {})) == (direct, None)
    if dtype != "O":
        part: Any = BatchSlice(Batch(Outline(("y",)), [np.concatenate([array, array])]), rows, 2 * rows)
        assert encode_response(Response("m", "1", part), Request("m", {})) == (direct, None)


def test_which_answers_are_long() -> None:
    large, small = np.zeros((1, 1 << 18), np.float32), np.zeros((1, 4), np.float32)
    wide: Any = np.zeros((1, (1 << 18) + 1), np.float32)

    def long(outputs: Any, *wishes: WantedOutput, binary: bool = False) -> bool:
        return is_long(Response("m", "1", outputs), Request("m", {}, outputs=wishes, binary=binary))

    assert long({"y": wide})
    assert long({"y": large, "z": small})
    assert not long({"y": large})
    assert not long({"y": wide}, binary=True)
    assert not long({"y": wide}, WantedOutput("y", binary=True))
    assert long({"y": wide, "z": small}, WantedOutput("z", binary=True), WantedOutput("y"))
    assert not long({"y": wide}, WantedOutput("y", parameters={"shared_memory_region": "r"}))
    assert not long({"y": wide}, WantedOutput("nope"))
    rows = Batch(Outline(("y",)), [np.zeros((4, 1 << 17), np.float32)])
    assert not long(BatchSlice(rows, 0, 1))
    assert long(BatchSlice(rows, 0, 3))


def test_answers_in_binary() -> None:
    head, rest = answer(np.array([1, 2], np.int16), whole_binary=True)
    assert head["outputs"][0] == {
        "name": "y", "datatype": "INT16", "shape": [2], "parameters": {"binary_data_size": 4}
    }  # fmt: skip
    assert rest == b"\x01\0\x02\0"


def test_bytes_that_are_no_text_need_binary() -> None:
    with pytest.raises(BadInput, match="UTF-8"):
        answer(bytes_array([b"\xff"]))
    assert answer(bytes_array([b"\xff"]), WantedOutput("y", binary=True))[1] == b"\x01\0\0\0\xff"


def test_classes() -> None:
    head, _ = answer(np.array([[0.1, 0.7, 0.2]], np.float32), WantedOutput("y", classification=2))
    assert head["outputs"][0]["data"] == ["0.700000:1", "0.200000:2"]
    assert head["outputs"][0]["shape"] == [1, 2]


def test_an_output_that_is_not_there() -> None:
    with pytest.raises(BadInput, match="no output 'z'"):
        answer(np.zeros(1), WantedOutput("z"))
