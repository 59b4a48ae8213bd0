"""Signature and TensorSpec: parsing, printing, and errors that name the fault."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import msgspec
import numpy as np
import pytest

from torchship.errors import BadConfig, BadInput
from torchship.tensors import DTYPES, Free, Signature, TensorSpec, as_array, bytes_array, dtype_name, numpy_dtype, plain

IMAGES = Signature.parse("image:FP32[-1,3,4,4] -> y:FP32[-1,10]")
TEXT = Signature.parse("ids:INT64[batch,seq:1..8], mask:INT64[batch,seq:1..8] -> y:FP32[-1,4]")


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_round_trip(name: str) -> None:
    assert dtype_name(numpy_dtype(name)) == name


def test_byte_strings_are_bytes_and_big_endian_is_native() -> None:
    assert dtype_name(np.array([b"a"]).dtype) == "BYTES"
    assert dtype_name(np.array(["a"]).dtype) == "BYTES"
    assert dtype_name(np.dtype(">f4")) == "FP32"
    assert numpy_dtype("BF16") == np.dtype(ml_dtypes.bfloat16)


def test_what_people_give_becomes_plain() -> None:
    turned = np.arange(6, dtype=">i4").reshape(2, 3).T[::-1]
    assert plain(turned).dtype == np.int32
    assert plain(turned).tolist() == turned.tolist()
    words = plain(as_array([[b"a\0", "\u00e9"], [b"c", b""]]))
    assert words.tolist() == [[b"a\0", "\u00e9".encode()], [b"c", b""]]
    assert plain(bytes_array([bytearray(b"c"), memoryview(b"\xff")])).tolist() == [b"c", b"\xff"]
    assert plain(as_array(["a\0", "b"])).tolist() == [b"a\0", b"b"]
    assert plain(np.array(["a", "bc"])).tolist() == [b"a", b"bc"]
    assert plain(words) is words
    assert as_array(np.ma.masked_array([1, 2])).tolist() == [1, 2]


@pytest.mark.parametrize(("item", "fault"), [(3, "int"), (None, "NoneType"), (1.5, "float"), ("\ud800", "surrogates")])
def test_what_is_no_element_of_bytes(item: object, fault: str) -> None:
    with pytest.raises(BadInput, match=fault):
        plain(np.array([b"a", item], object))


def test_masked_values_are_not_made_up() -> None:
    with pytest.raises(BadInput, match="without a value"):
        as_array(np.ma.masked_array([1, 2], [False, True]))


def test_unknown_dtypes_are_named() -> None:
    with pytest.raises(BadInput, match="FP8"):
        numpy_dtype("FP8")
    with pytest.raises(BadInput, match="complex64"):
        dtype_name(np.dtype(np.complex64))


@pytest.mark.parametrize(
    "text",
    ["image:FP32[-1,3,224,224]", "ids:INT64[batch,seq:1..512]", "x:BF16[2..,4]", "scalar:FP32[]", "a.b-c:BYTES[1]"],
)
def test_specs_print_as_they_read(text: str) -> None:
    assert str(TensorSpec.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("image", "not a tensor"),
        ("image:FP31[1]", "FP31"),
        ("image:FP32[1,x y]", "x y"),
        ("image:FP32[5..2]", "before it begins"),
        ("image:FP32[1,,2]", "not an axis"),
        ("1x:FP32[1]", "not a tensor"),
    ],
)
def test_bad_specs_name_the_part(text: str, fault: str) -> None:
    with pytest.raises(BadConfig, match=fault):
        TensorSpec.parse(text)


def test_a_signature_survives_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(TEXT), type=Signature) == TEXT
    assert TEXT.inputs[0].shape == (Free(name="batch"), Free(1, 8, "seq"))
    with pytest.raises(BadConfig, match="not a signature"):
        Signature.parse("x:FP32[1]")


def test_rows_are_counted() -> None:
    assert IMAGES.check({"image": np.zeros((5, 3, 4, 4), np.float32)}) == 5


@pytest.mark.parametrize(
    ("array", "fault"),
    [
        (np.zeros((1, 3, 4, 4)), "FP64, expected FP32"),
        (np.zeros((3, 4, 4), np.float32), "a single row still needs its batch axis"),
        (np.zeros((1, 3, 4, 5), np.float32), "axis 3 is 5, expected 4"),
        (np.zeros((0, 3, 4, 4), np.float32), "at least 1|empty"),
    ],
)
def test_bad_tensors_are_named(array: np.ndarray, fault: str) -> None:
    with pytest.raises(BadInput) as caught:
        IMAGES.check({"image": array})
    assert __import__("re").search(fault, caught.value.line)


def test_wrong_names_are_listed() -> None:
    with pytest.raises(BadInput, match=r"missing \['image'\], unknown \['picture'\]"):
        IMAGES.check({"picture": np.zeros((1, 3, 4, 4), np.float32)})
    with pytest.raises(BadInput, match="unknown"):
        IMAGES.check({"image": np.zeros((1, 3, 4, 4), np.float32), "more": np.zeros(1)})


def test_axes_of_one_name_are_equally_long() -> None:
    good = np.zeros((2, 5), np.int64)
    assert TEXT.check({"ids": good, "mask": good}) == 2
    with pytest.raises(BadInput, match="axis 'seq' is 5 elsewhere"):
        TEXT.check({"ids": good, "mask": good[:, :4]})
    with pytest.raises(BadInput, match="expected 1 to 8"):
        TEXT.check({"ids": np.zeros((2, 9), np.int64), "mask": np.zeros((2, 9), np.int64)})


def test_rows_must_agree() -> None:
    pair = Signature.parse("a:FP32[-1,1], b:FP32[-1,1] -> y:FP32[-1]")
    with pytest.raises(BadInput, match="differ in their number of rows"):
        pair.check({"a": np.zeros((1, 1), np.float32), "b": np.zeros((2, 1), np.float32)})


def test_nan_is_refused_only_on_request() -> None:
    array = np.full((1, 3, 4, 4), np.nan, np.float32)
    assert IMAGES.check({"image": array}) == 1
    with pytest.raises(BadInput, match="NaN"):
        IMAGES.check({"image": array}, nan="refuse")


def test_optional_inputs_are_marked_and_may_be_absent() -> None:
    text = "x:FP32[-1,2], mask?:BOOL[-1,2], bias?:FP32[-1] -> y:FP32[-1]"
    found = Signature.parse(text)
    assert str(found) == text
    assert Signature.parse(str(found)) == found
    assert msgspec.json.decode(msgspec.json.encode(found), type=Signature) == found
    x, bias = np.zeros((3, 2), np.float32), np.zeros(3, np.float32)
    assert found.check({"x": x}) == 3
    assert found.check({"bias": bias, "x": x}) == 3
    assert str(found.taking({"bias"})) == "x:FP32[-1,2], bias?:FP32[-1] -> y:FP32[-1]"
    with pytest.raises(BadInput, match=r"^input names do not fit: missing \['x'\]$") as caught:
        found.check({"bias": bias})
    assert caught.value.hint == "the inputs are x, mask (optional), bias (optional)"
    with pytest.raises(BadInput, match=r"unknown \['masc'\]"):
        found.check({"x": x, "masc": bias})
    with pytest.raises(BadInput, match="differ in their number of rows"):
        found.check({"x": x, "bias": bias[:2]})
    with pytest.raises(BadInput, match="tensor 'bias' holds NaN"):
        found.check({"x": x, "bias": bias * np.nan}, nan="refuse")


def test_where_nothing_is_optional_a_signature_is_written_as_ever() -> None:
    assert msgspec.json.encode(IMAGES.outputs[0]) == b'{"name":"y","dtype":"FP32","shape":[[1,null,""],10]}'


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("x:FP32[-1] -> y?:FP32[-1]", "an output is optional"),
        ("a?:FP32[-1], b:FP32[-1] -> y:FP32[-1]", "an input comes after an optional one"),
        ("a?:FP32[-1], b?:FP32[-1] -> y:FP32[-1]", "every input is optional, but the rows"),
        ("?a:FP32[-1] -> y:FP32[-1]", "is not a tensor"),
    ],
)
def test_optional_inputs_that_cannot_be_are_refused(text: str, fault: str) -> None:
    with pytest.raises(BadConfig, match=fault):
        Signature.parse(text)
    if "every" in fault:
        assert Signature.parse(text, batched=False).check({}) == 1


def test_plain_arrays_and_lists_load_no_masked_arrays() -> None:
    code = (
        "import sys, numpy\nfrom torchship.tensors import as_array\n"
        "as_array(numpy.ones(3)), as_array([1, 2]), as_array(b'x')\nassert 'numpy.ma' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
