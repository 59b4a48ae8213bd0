"""A body that is known by its bytes means what it means when it is read in the general way, and so do answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from torchship.errors import BadInput
from torchship.tensors import Array, numpy_dtype
from torchship.wire.messages import Batch, BatchSlice, Outline, RawInputs, Request, Response
from torchship.wire.oip_grpc import InferCodec
from torchship.wire.oip_json import TemplateCache, decode_request, encode_response
from torchship.wire.schema import message

NUMBERS = ("FP16", "FP32", "FP64", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")


def value_of(kind: str) -> st.SearchStrategy[Any]:
    """Numbers as callers write them: in range, and now and then out of it or of another kind."""
    whole = st.integers(-(2**65), 2**65) | st.integers(-200, 300)
    odd = st.sampled_from([None, True, "1", [1], 1e400, 0.5, -0.0])
    return whole | st.floats(allow_nan=False, allow_infinity=False) | odd if kind[0] == "F" else whole | odd


def body_of(data: Any, kind: str, *, spaces: bool, last: bool) -> bytes:
    """A request of one input of two rows, its data before or after the rest."""
    told = {"shape": [2, 2], "datatype": kind}
    given = {"name": 'x"data":', **told, "data": data} if last else {"name": "x", "data": data, **told}
    outputs = [{"name": "y", "parameters": {"binary_data": True}}][: len(kind) % 2]
    text = msgspec.json.encode({"inputs": [given], "parameters": {"timeout": 5_000_000, "top": 3}, "outputs": outputs})
    return msgspec.json.format(text, indent=1) if spaces else text


def outcome(read: Any) -> Any:
    """What a reader says, so that two can be compared."""
    try:
        request = read()
    except BadInput as fault:
        return str(fault)
    arrays = {name: (array.dtype, array.shape, array.tobytes()) for name, array in request.inputs.items()}
    said = request.parameters, request.deadline, request.priority, request.id, request.binary, request.model
    return arrays, said, request.outputs


@given(st.data(), st.sampled_from(NUMBERS), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_json_is_read_the_same_both_ways(data: st.DataObject, kind: str, spaces: bool, last: bool) -> None:
    templates = TemplateCache(None)
    learnt = body_of([1, 2, 3, 4], kind, spaces=spaces, last=last)
    templates.learn(learnt, decode_request(learnt, model="m"))
    items = data.draw(st.lists(value_of(kind), min_size=3, max_size=5))
    body = body_of(items, kind, spaces=spaces, last=last)
    known = templates.read(body)
    assert known is None or outcome(lambda: known) == outcome(lambda: decode_request(body, model="m"))
    assert templates.read(learnt) is not None or last, "a plain body is known the second time"


def test_what_only_looks_like_the_data_is_not_taken_for_it() -> None:
    given = b'"inputs":[{"name":"x","shape":[1,1],"datatype":"FP32","data":[7]}]'
    for text in (b'{"more":{"data":[%d]},' + given + b"}", b"{" + given + b',"more":{"data":[%d]}}'):
        templates = TemplateCache(None)
        for value in (7, 8, 7):
            body = text % value
            templates.learn(body, decode_request(body, model="m"))
            known = templates.read(body)
            assert known is None or known.inputs["x"].tolist() == [[7.0]]


@given(st.binary(max_size=40), st.integers(0, 160))
@settings(max_examples=150, deadline=None)
def test_damaged_bodies_are_never_taken_for_known_ones(noise: bytes, place: int) -> None:
    templates = TemplateCache(None)
    learnt = body_of([1, 2, 3, 4], "FP32", spaces=False, last=False)
    templates.learn(learnt, decode_request(learnt, model="m"))
    body = learnt[:place] + noise + learnt[place + len(noise) :]
    known = templates.read(body)
    assert known is None or outcome(lambda: known) == outcome(lambda: decode_request(body, model="m"))


@given(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_binary_is_read_the_same_both_ways(kinds: list[str], rows: int, more: int) -> None:
    arrays = [np.arange(rows * 5).reshape(rows, 5).astype(numpy_dtype(kind)) for kind in kinds]
    inputs = [
        {"name": f"x{i}", "shape": [rows, 5], "datatype": kind, "parameters": {"binary_data_size": array.nbytes}}
        for i, (kind, array) in enumerate(zip(kinds, arrays, strict=True))
    ]
    head = msgspec.json.encode({"inputs": inputs, "parameters": {"binary_data_output": True}})
    body = b"".join([head, *[array.tobytes() for array in arrays]])
    templates = TemplateCache(len(head))
    templates.learn(body, decode_request(body, model="m", header_length=len(head)))
    known = templates.read(body)
    assert known is not None
    assert type(known.inputs) is RawInputs
    assert outcome(lambda: known) == outcome(lambda: decode_request(body, model="m", header_length=len(head)))
    assert templates.read(body + b"x" * more) is None or not more


def batch_of(kinds: list[str], rows: int) -> dict[str, Array]:
    rng = np.random.default_rng(rows)
    return {f"y{i}": (rng.standard_normal((rows, 3)) * 100).astype(numpy_dtype(kind)) for i, kind in enumerate(kinds)}


def shares(arrays: Mapping[str, Array], cuts: list[int]) -> list[tuple[BatchSlice, dict[str, Array]]]:
    """Each caller's share, and the same as plain arrays."""
    batch, found, start = Batch(Outline(tuple(arrays)), list(arrays.values())), [], 0
    for count in cuts:
        plain = {name: array[start : start + count] for name, array in arrays.items()}
        found.append((BatchSlice(batch, start, start + count), plain))
        start += count
    return found


@given(
    st.lists(st.sampled_from((*NUMBERS, "BOOL")), min_size=1, max_size=3),
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(["", "7", 'a"b\n']),
)
@settings(max_examples=100, deadline=None)
def test_answers_are_written_the_same_both_ways(kinds: list[str], cuts: list[int], binary: bool, name: str) -> None:
    arrays = batch_of(kinds, sum(cuts))
    arrays["y0"] = arrays["y0"] if kinds[0][0] != "F" else np.where(arrays["y0"] > 90, np.nan, arrays["y0"])
    request = Request("m", {}, binary=binary)
    codec, answer = InferCodec(), message("inference.ModelInferResponse")
    for share, plain in shares(arrays, cuts):
        ours, theirs = Response("m", "1", share, name), Response("m", "1", plain, name)
        assert encode_response(ours, request) == encode_response(theirs, request)
        assert answer.FromString(codec.encode(ours, request)) == answer.FromString(codec.encode(theirs, request))
        assert {key: array.tobytes() for key, array in share.items()} == {k: a.tobytes() for k, a in plain.items()}
