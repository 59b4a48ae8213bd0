"""Fuzz: whatever comes in, a front door answers, refuses or hangs up; it never raises, and never says 5xx but 503."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import hpack
import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.protocols.running import Running, WatchedService, run, running
from torchship.errors import BadInput, StageFailed
from torchship.serve.api import grpc, rest
from torchship.serve.api.front import Front
from torchship.serve.http.http1 import Connection
from torchship.serve.http.http2.connection import Connection2
from torchship.serve.http.listen import Listener
from torchship.serve.http.router import Router
from torchship.serve.http.site import ConnectionLimits, Site
from torchship.wire import frames as h2
from torchship.wire import oip_grpc, oip_json
from torchship.wire.oip_grpc import InferCodec
from torchship.wire.schema import message

CALM = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


class Wire(asyncio.Transport):
    """A transport that remembers what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.sent += data

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def set_protocol(self, protocol: Any) -> None:
        pass


def talk(kind: type[Connection] | type[Connection2], pieces: list[bytes]) -> bytes:
    """Feed a connection; everything it wrote, after its answers have come."""

    async def main(front: Front) -> bytes:
        limits = ConnectionLimits(max_body=10_000, head=2000, streams=5, pipelined=3)
        site = Site(Router(rest.all_routes(front)).resolve, limits, rpcs=grpc.all_rpcs(front))
        site.tick(1.0)
        wire = Wire()
        connection = kind(site)
        connection.connection_made(wire)
        for piece in pieces:
            connection.data_received(piece)
            await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
        connection.overdue(2.0)
        connection.retire()
        connection.connection_lost(None)
        await asyncio.sleep(0)
        return wire.sent

    problems: list[Any] = []

    async def watched(service: WatchedService) -> bytes:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
        return await main(Front(service))

    sent = run(watched)
    assert problems == []
    return sent


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(ends)]


BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "data": [0.5] * 16}]}).encode()
LINES = st.sampled_from(
    [
        b"GET /v2 HTTP/1.1\r\n", b"POST /v2/models/echo/infer HTTP/1.1\r\n", b"GET /docs HTTP/1.0\r\n", b"Host: x\r\n",
        b"POST /v2/models/text/generate_stream HTTP/1.1\r\n", b"Content-Length: %d\r\n" % len(BODY), b"\r\n", BODY,
        b"Transfer-Encoding: chunked\r\n", b"5\r\nabcde\r\n", b"0\r\n\r\n", b"Content-Encoding: gzip\r\n",
        b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"Content-Length: 3\r\n", b"{}\n", h2.PREFACE,
        b"Inference-Header-Content-Length: 9\r\n", b"Content-Type: image/png\r\n", b"Accept-Encoding: gzip\r\n",
        b"Upgrade: h2c\r\n", b" folded\r\n", b"POST /v2/repository/models/%2e%2e/load HTTP/1.1\r\n",
    ]
)  # fmt: skip


@CALM
@given(st.lists(st.one_of(LINES, st.binary(max_size=20)), max_size=12), st.lists(st.integers(0, 2000), max_size=4))
def test_http1(parts: list[bytes], places: list[int]) -> None:
    sent = talk(Connection, cut(b"".join(parts), places))
    for status in re.findall(rb"HTTP/1.1 (5\d\d)", sent):
        assert status in (b"501", b"503", b"505")


NUMBERS = st.integers(0, 7)
PATHS = st.sampled_from(
    ["/inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelStreamInfer", "/v2", "/no",
     "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"]
)  # fmt: skip


@st.composite
def some_frames(draw: st.DrawFn) -> bytes:
    encoder = hpack.Encoder()
    parts = [h2.PREFACE, h2.settings(())]
    for _ in range(draw(st.integers(1, 8))):
        kind, number, flags = (
            draw(st.integers(0, 10)),
            draw(NUMBERS),
            draw(st.sampled_from([0, 1, 4, 5, 8, 13, 0x24, 255])),
        )
        if kind == h2.HEADERS and draw(st.booleans()):
            fields = [
                (":method", "POST"), (":scheme", "http"), (":path", draw(PATHS)), (":authority", "x"),
                ("content-type", draw(st.sampled_from(["application/grpc", "application/json"]))),
            ]  # fmt: skip
            payload = encoder.encode(fields)
        elif kind == h2.DATA and draw(st.booleans()):
            blob = draw(st.binary(max_size=30))
            payload = b"\0" + len(blob).to_bytes(4, "big") + blob
        else:
            payload = draw(st.binary(max_size=24))
        parts.append(h2.frame(kind, flags, number, payload))
    return b"".join(parts)


@CALM
@given(st.one_of(some_frames(), st.binary(max_size=80)), st.lists(st.integers(0, 500), max_size=4))
def test_http2(data: bytes, places: list[int]) -> None:
    talk(Connection2, cut(data, places))


def _asked() -> bytes:
    ask = message("inference.ModelInferRequest")(model_name="echo", id="7")
    ask.parameters["a"].double_param = 1.5
    for name in ("x", "z"):
        tensor = ask.inputs.add(name=name, datatype="FP32", shape=[1, 4])
        tensor.parameters["p"].bool_param = True
        ask.raw_input_contents.append(np.zeros(4, np.float32).tobytes())
    ask.inputs.add(name="c", datatype="INT8", shape=[2]).contents.int_contents.extend([1, -5])
    ask.outputs.add(name="y").parameters["classification"].int64_param = 2
    data: bytes = ask.SerializeToString()
    return data


ASKED = _asked()


@settings(CALM, max_examples=400)
@given(st.lists(st.tuples(st.integers(0, len(ASKED)), st.integers(0, 3), st.binary(max_size=5)), max_size=4))
def test_protobuf(changes: list[tuple[int, int, bytes]]) -> None:
    data = ASKED
    for place, gone, new in changes:
        data = data[:place] + new + data[place + gone :]
    codec = InferCodec()
    for _ in range(2):  # the second time from what was remembered
        with suppress(BadInput):
            request = codec.decode(b"\0" * 5 + data, 5)
            assert all(array.size >= 0 for array in request.inputs.values())
    for streamed in (False, True):
        with suppress(StageFailed):
            oip_grpc.decode_response(data, streamed=streamed)


@CALM
@given(st.one_of(st.binary(max_size=80), st.just(BODY.replace(b"inputs", b"outputs"))), st.none() | st.integers(0, 90))
def test_answers(data: bytes, length: int | None) -> None:
    with suppress(StageFailed):
        oip_json.decode_response(data, header_length=length)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    async def listen(front: Front) -> Listener:
        return await rest.listen(front, port=0)

    with running(listen) as found:
        yield found


def test_what_our_openapi_description_promises(server: Running) -> None:
    """schemathesis makes requests out of the description, good and bad ones."""
    import schemathesis
    from schemathesis.generation import GenerationMode

    base = f"http://127.0.0.1:{server.port}"
    schema = schemathesis.openapi.from_dict(httpx.get(f"{base}/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]  # type: ignore[union-attr]
    assert len(operations) > 30
    cases = st.one_of(
        [operation.as_strategy(generation_mode=mode) for operation in operations
         for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]
    )  # fmt: skip
    statuses: set[int] = set()

    @settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
    @given(cases)
    def ask(case: Any) -> None:
        answer = case.call(base_url=base)
        statuses.add(answer.status_code)
        assert answer.status_code < 500 or answer.status_code == 503, (case.as_curl_command(), answer.text)

    ask()
    assert {200, 400} <= statuses
