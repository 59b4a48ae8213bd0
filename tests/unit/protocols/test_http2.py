"""HTTP/2 as an attacker or a strict reader of RFC 9113 would send it: each case has its own right answer."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import hpack
import numpy as np
import pytest

from tests.unit.protocols.peer import LIVE, Peer
from tests.unit.protocols.running import STREAMS, WAYS, Running, WatchedService, receivers, run, running
from torchship.serve.api import rest
from torchship.serve.api.front import Front
from torchship.serve.http.http2.framing import changes_table
from torchship.serve.http.site import ConnectionLimits
from torchship.wire import frames as h2
from torchship.wire.schema import message

PACKED = [("accept-encoding", "br, gzip"), ("content-encoding", "gzip")]
INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module", params=WAYS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    async def listen(front: Front) -> Any:
        limits, pool = ConnectionLimits(max_body=300_000, head=8192, streams=20), await receivers(request.param)
        return await rest.listen(front, port=0, grpc_only=True, limits=limits, receivers=pool)

    with running(listen) as found:
        yield found


def echo(rows: int = 1) -> bytes:
    ask = message("inference.ModelInferRequest")(model_name="echo")
    ask.inputs.add(name="x", datatype="FP32", shape=[rows, 16])
    ask.raw_input_contents.append(np.zeros((rows, 16), np.float32).tobytes())
    data: bytes = ask.SerializeToString()
    return data


def test_a_call(server: Running) -> None:
    with Peer(server) as peer:
        for number in (1, 3, 5, 7):
            peer.send(peer.call(number))
            assert peer.status(number)["grpc-status"] == "0"


def test_in_single_bytes(server: Running) -> None:
    with Peer(server, greet=False) as peer:
        for byte in h2.PREFACE + h2.settings(()) + peer.call(1, INFER, echo()):
            peer.send(bytes([byte]))
        assert peer.status(1)["grpc-status"] == "0"


@pytest.mark.parametrize(
    ("extra", "body", "status"),
    [
        ("/no.Service/No", b"", "12"),
        (INFER, b"\xff\xff", "3"),
        (INFER, b"", "5"),
        (INFER, message("inference.ModelInferRequest")(model_name="none").SerializeToString(), "5"),
        (INFER, message("inference.ModelInferRequest")(model_name="echo").SerializeToString(), "3"),
    ],
)
def test_calls_that_fail(server: Running, extra: str, body: bytes, status: str) -> None:
    with Peer(server) as peer:
        peer.send(peer.call(1, extra, body))
        assert peer.status(1)["grpc-status"] == status
        peer.send(peer.call(3))
        assert peer.status(3)["grpc-status"] == "0"


@pytest.mark.parametrize("data", [b"", b"\0\0\0\0", b"\0\0\0\0\5ab", b"\0\0\0\0\0\0\0\0\0\0", b"\1\0\0\0\1a"])
def test_a_message_that_is_not_one(server: Running, data: bytes) -> None:
    with Peer(server) as peer:
        peer.send(peer.headers(1) + h2.frame(h2.DATA, h2.END_STREAM, 1, data))
        assert peer.status(1)["grpc-status"] == "3"


_HEAD = h2.HEADERS
CONNECTION_FAULTS: list[tuple[str, bytes, int]] = [
    ("a frame that is too large", h2.TOP.pack(16, 0, h2.DATA, 0, 1), h2.FRAME_SIZE_ERROR),
    ("DATA on stream 0", h2.frame(h2.DATA, 0, 0, b"a"), h2.PROTOCOL_ERROR),
    ("DATA on an idle stream", h2.frame(h2.DATA, 0, 1, b"a"), h2.PROTOCOL_ERROR),
    ("HEADERS on stream 0", h2.frame(_HEAD, h2.END_HEADERS, 0, b"\x82"), h2.PROTOCOL_ERROR),
    ("HEADERS on an even stream", h2.frame(_HEAD, h2.END_HEADERS, 2, b"\x82"), h2.PROTOCOL_ERROR),
    ("padding beyond the frame", h2.frame(_HEAD, h2.END_HEADERS | h2.PADDED, 1, b"\xff\x82"), h2.PROTOCOL_ERROR),
    ("a stream that depends on itself", h2.frame(_HEAD, 0x24, 1, b"\0\0\0\1\0\x82"), h2.PROTOCOL_ERROR),
    ("a header block that is no HPACK", h2.frame(_HEAD, h2.END_HEADERS, 1, b"\xff\xff\xff\xff"), h2.COMPRESSION_ERROR),
    ("an index that is not there", h2.frame(_HEAD, h2.END_HEADERS, 1, b"\xfe"), h2.COMPRESSION_ERROR),
    ("CONTINUATION of nothing", h2.frame(h2.CONTINUATION, 0, 1, b""), h2.PROTOCOL_ERROR),
    ("an interrupted block", h2.frame(_HEAD, 0, 1, b"\x82") + h2.frame(h2.PING, 0, 0, bytes(8)), h2.PROTOCOL_ERROR),
    ("PRIORITY on stream 0", h2.frame(h2.PRIORITY, 0, 0, bytes(5)), h2.PROTOCOL_ERROR),
    ("RST_STREAM of an idle stream", h2.reset(1, 8), h2.PROTOCOL_ERROR),
    ("RST_STREAM of a wrong size", h2.frame(h2.RST_STREAM, 0, 1, b"a"), h2.FRAME_SIZE_ERROR),
    ("SETTINGS on a stream", h2.frame(h2.SETTINGS, 0, 1), h2.PROTOCOL_ERROR),
    ("SETTINGS of a wrong size", h2.frame(h2.SETTINGS, 0, 0, b"abc"), h2.FRAME_SIZE_ERROR),
    ("an ACK with content", h2.frame(h2.SETTINGS, h2.ACK, 0, bytes(6)), h2.FRAME_SIZE_ERROR),
    ("ENABLE_PUSH of 2", h2.settings([(2, 2)]), h2.PROTOCOL_ERROR),
    ("a window that is too large", h2.settings([(4, 2**31)]), h2.FLOW_CONTROL_ERROR),
    ("a frame size that is too small", h2.settings([(5, 1)]), h2.PROTOCOL_ERROR),
    ("PUSH_PROMISE", h2.frame(h2.PUSH_PROMISE, 0, 1, bytes(4)), h2.PROTOCOL_ERROR),
    ("PING of a wrong size", h2.frame(h2.PING, 0, 0, b"abc"), h2.FRAME_SIZE_ERROR),
    ("PING on a stream", h2.frame(h2.PING, 0, 1, bytes(8)), h2.PROTOCOL_ERROR),
    ("WINDOW_UPDATE of 0", h2.window_update(0, 0), h2.PROTOCOL_ERROR),
    ("a window that overflows", h2.window_update(0, 2**31 - 1), h2.FLOW_CONTROL_ERROR),
    ("WINDOW_UPDATE of an idle stream", h2.window_update(1, 1), h2.PROTOCOL_ERROR),
    ("a wrong GOAWAY", h2.frame(h2.GOAWAY, 0, 0, b"abc"), h2.FRAME_SIZE_ERROR),
]


@pytest.mark.parametrize(
    ("data", "code"), [case[1:] for case in CONNECTION_FAULTS], ids=[c[0] for c in CONNECTION_FAULTS]
)
def test_what_ends_the_connection(server: Running, data: bytes, code: int) -> None:
    with Peer(server) as peer:
        peer.send(data)
        assert peer.goaway() == code


def test_not_http2(server: Running) -> None:
    with Peer(server, greet=False) as peer:
        peer.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert peer.goaway() == h2.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "fields",
    [
        [(":method", "POST"), (":scheme", "http")],
        [(":method", "POST"), (":scheme", "http"), (":path", "")],
        [(":method", "POST"), (":method", "POST"), (":scheme", "http"), (":path", "/")],
        [(":method", "POST"), (":scheme", "http"), (":path", "/"), (":status", "200")],
        [("a", "b"), (":method", "POST"), (":scheme", "http"), (":path", "/")],
        [(":method", "POST"), (":scheme", "http"), (":path", "/"), ("A", "b")],
        [(":method", "POST"), (":scheme", "http"), (":path", "/"), ("a", "b\r\nc: d")],
        [(":method", "POST"), (":scheme", "http"), (":path", "/"), ("connection", "close")],
        [(":method", "POST"), (":scheme", "http"), (":path", "/"), ("te", "gzip")],
        [(":method", "POST"), (":scheme", "http"), (":path", "/"), ("content-length", "x")],
        [(":method", "POST"), (":scheme", "http"), (":path", "/"), ("content-length", "7")],
    ],
)
def test_what_ends_a_stream(server: Running, fields: list[tuple[str, str]]) -> None:
    with Peer(server) as peer:
        peer.send(h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 1, peer.encoder.encode(fields)))
        assert peer.reset(1) == h2.PROTOCOL_ERROR
        peer.send(peer.call(3))
        assert peer.status(3)["grpc-status"] == "0"


def test_data_after_the_end(server: Running) -> None:
    server.service.delay = 0.3
    try:
        with Peer(server) as peer:
            peer.send(peer.call(1, INFER, echo()) + h2.frame(h2.DATA, 0, 1, b"a"))
            assert peer.reset(1) == h2.STREAM_CLOSED
    finally:
        server.service.delay = 0.0


def test_a_small_window_is_kept_to(server: Running) -> None:
    with Peer(server, settings=((4, 1000),)) as peer:
        peer.send(peer.call(1, INFER, echo(100)))
        got, allowed = 0, 1000
        for kind, flags, number, payload in peer.frames():
            if kind == h2.DATA and number == 1:
                got += len(payload)
                assert got <= allowed
                if got == allowed:
                    peer.send(h2.window_update(1, 1500))
                    allowed += 1500
            if kind == h2.HEADERS and flags & h2.END_STREAM:
                break
        assert got > 6400


def test_a_window_that_shrinks_below_zero(server: Running) -> None:
    with Peer(server, settings=((4, 500),)) as peer:
        peer.send(peer.call(1, INFER, echo(100)))
        assert len(peer.until(h2.DATA, 1)[1]) == 500
        peer.send(h2.settings([(4, 0)]))
        peer.until(h2.SETTINGS)
        peer.send(h2.window_update(1, 400) + h2.frame(h2.PING, 0, 0, bytes(8)))
        assert [kind for kind, *_ in (next(peer.frames()),)] == [h2.PING]
        peer.send(h2.window_update(1, 100_000))
        assert peer.status(1)["grpc-status"] == "0"


def test_more_than_the_stream_window(server: Running) -> None:
    with Peer(server) as peer:
        peer.send(peer.headers(1, INFER))
        blob = h2.frame(h2.DATA, 0, 1, bytes(16384))
        peer.send(blob * 10)
        peer.send(peer.call(3))
        assert peer.status(3)["grpc-status"] == "0"
        peer.send(blob * 10)
        assert peer.status(1)["grpc-status"] == "8"


def test_all_bodies_together_are_bounded() -> None:
    async def listen(front: Front) -> Any:
        return await rest.listen(front, port=0, grpc_only=True, limits=ConnectionLimits(bodies=50_000))

    with running(listen) as found, Peer(found) as peer:
        blob = bytes(16_000)
        peer.send(b"".join(peer.headers(n, INFER) + h2.frame(h2.DATA, 0, n, blob) * 2 for n in (1, 3)))
        assert peer.reset(3) == h2.ENHANCE_YOUR_CALM
        peer.send(h2.reset(1, h2.CANCEL) + peer.headers(5) + h2.frame(h2.DATA, 0, 5, b"\0\0"))
        peer.send(h2.frame(h2.DATA, h2.END_STREAM, 5, bytes(3)))
        assert peer.status(5)["grpc-status"] == "0"


def test_too_many_streams(server: Running) -> None:
    server.service.delay = 0.5
    try:
        with Peer(server) as peer:
            peer.send(b"".join(peer.call(number, INFER, echo()) for number in range(1, 61, 2)))
            refused, good = 0, 0
            for kind, flags, _, payload in peer.frames():
                refused += kind == h2.RST_STREAM and payload == (7).to_bytes(4, "big")
                good += kind == h2.HEADERS and bool(flags & h2.END_STREAM)
                if refused + good == 30:
                    break
            assert (refused, good) == (10, 20)
    finally:
        server.service.delay = 0.0


def test_rapid_reset(server: Running) -> None:
    server.service.delay = 1.0
    try:
        with Peer(server) as peer:
            one = b"".join(peer.call(n, INFER, echo()) + h2.reset(n, 8) for n in range(1, 6001, 2))
            peer.send(one)
            assert peer.goaway() == h2.ENHANCE_YOUR_CALM
    finally:
        server.service.delay = 0.0


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (h2.frame(h2.PING, 0, 0, bytes(8)), 4000),
        (h2.settings(()), 400),
        (h2.frame(h2.PRIORITY, 0, 9, bytes(5)), 4000),
    ],
)
def test_floods(server: Running, data: bytes, count: int) -> None:
    with Peer(server) as peer:
        peer.send(data * count)
        assert peer.goaway() == h2.ENHANCE_YOUR_CALM


def test_empty_data_flood(server: Running) -> None:
    with Peer(server) as peer:
        peer.send(peer.headers(1, INFER) + h2.frame(h2.DATA, 0, 1) * 4000)
        assert peer.goaway() == h2.ENHANCE_YOUR_CALM


def test_continuation_flood(server: Running) -> None:
    with Peer(server) as peer:
        peer.send(h2.frame(h2.HEADERS, 0, 1, b"\x82") + h2.frame(h2.CONTINUATION, 0, 1, b"") * 200)
        assert peer.goaway() == h2.ENHANCE_YOUR_CALM


def test_header_bomb(server: Running) -> None:
    with Peer(server) as peer:
        big = peer.encoder.encode([(":method", "POST"), ("x-big", "a" * 4000)])
        index = bytes([0x80 | 62])
        peer.send(h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 1, big))
        peer.send(h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 3, index * 4000))
        assert peer.goaway() == h2.ENHANCE_YOUR_CALM


def test_a_block_in_pieces_with_padding_and_priority(server: Running) -> None:
    with Peer(server) as peer:
        block = peer.headers(1)[9:]
        first = b"\2" + bytes(5) + block[:4] + b"\0\0"
        peer.send(h2.frame(h2.HEADERS, h2.PADDED | h2.PRIORITY_FLAG, 1, first))
        peer.send(h2.frame(h2.CONTINUATION, h2.END_HEADERS, 1, block[4:]))
        peer.send(h2.frame(h2.DATA, h2.PADDED | h2.END_STREAM, 1, b"\3" + bytes(5) + bytes(3)))
        assert peer.status(1)["grpc-status"] == "0"


def test_trailers_from_the_client(server: Running) -> None:
    with Peer(server) as peer:
        peer.send(peer.headers(1) + h2.frame(h2.DATA, 0, 1, bytes(5)))
        peer.send(h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 1, peer.encoder.encode([("a", "b")])))
        assert peer.status(1)["grpc-status"] == "0"
        peer.send(peer.headers(3) + h2.frame(h2.DATA, 0, 3, bytes(5)))
        peer.send(h2.frame(h2.HEADERS, h2.END_HEADERS, 3, peer.encoder.encode([("a", "b")])))
        assert peer.reset(3) == h2.PROTOCOL_ERROR


def test_blocks_are_known_until_the_table_changes(server: Running) -> None:
    with Peer(server) as peer:
        for number, path in enumerate([LIVE, LIVE, "/no.Service/No", "/no.Service/No", LIVE, LIVE, LIVE]):
            peer.send(peer.call(2 * number + 1, path))
            assert peer.status(2 * number + 1)["grpc-status"] == ("0" if path == LIVE else "12")


def test_what_changes_the_table() -> None:
    encoder = hpack.Encoder()
    first = encoder.encode([(":method", "POST"), ("a", "b")])
    assert changes_table(first)
    assert not changes_table(encoder.encode([(":method", "POST"), ("a", "b")]))
    assert not changes_table(h2.literal(b"a" * 200, b"b" * 300) + b"\x82")
    assert changes_table(b"\x82\x3f\xe1\x1f")


def test_goaway_drains(server: Running) -> None:
    server.service.delay = 0.2
    try:
        with Peer(server) as peer:
            peer.send(peer.call(1, INFER, echo()) + h2.goaway(0, 0))
            assert peer.status(1)["grpc-status"] == "0"
    finally:
        server.service.delay = 0.0


def test_rest_over_http2(server: Running) -> None:
    async def listen(front: Front) -> Any:
        return await rest.listen(front, port=0)

    with running(listen) as found, Peer(found) as peer:
        fields = [(":method", "GET"), (":scheme", "http"), (":path", "/v2/models/echo"), (":authority", "x")]
        peer.send(h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 1, peer.encoder.encode(fields)))
        assert peer.status(1)[":status"] == "200"
        post = [(":method", "POST"), *fields[1:2], (":path", "/v2/models/echo/infer"), (":authority", "x")]
        peer.send(h2.frame(h2.HEADERS, h2.END_HEADERS, 3, peer.encoder.encode(post)))
        peer.send(h2.frame(h2.DATA, h2.END_STREAM, 3, b"{"))
        assert peer.status(3)[":status"] == "400"
        peer.send(peer.call(5))
        assert peer.status(5)["grpc-status"] == "0"
        body = b'{"inputs":[{"name":"x","shape":[999,16],"datatype":"FP32","data":[%b]}]}' % b",".join([b"1"] * 15984)
        peer.send(h2.frame(h2.HEADERS, h2.END_HEADERS, 7, peer.encoder.encode([*post, *PACKED])))
        peer.send(h2.frame(h2.DATA, h2.END_STREAM, 7, gzip.compress(body)))
        told = peer.status(7)
        assert (told[":status"], told["content-encoding"], told["vary"]) == ("200", "gzip", "accept-encoding")


def test_a_stream_waits_for_its_window(server: Running) -> None:
    """A model that could give a million answers gives only so many to a caller that takes none."""
    ask = message("inference.ModelInferRequest")(model_name=STREAMS)
    ask.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a" * 1000)
    ask.parameters["count"].int64_param = 1_000_000
    blob = ask.SerializeToString()
    with Peer(server, settings=((4, 500),)) as peer:
        peer.send(peer.call(1, "/inference.GRPCInferenceService/ModelStreamInfer", blob))
        assert len(peer.until(h2.DATA, 1)[1]) == 500
        peer.send(h2.frame(h2.PING, 0, 0, bytes(8)))
        peer.until(h2.PING)
        peer.send(h2.window_update(1, 2000))
        got = 0
        while got < 2000:
            got += len(peer.until(h2.DATA, 1)[1])
        assert got == 2000


def test_a_client_that_streams_far_ahead_is_answered_in_order(server: Running) -> None:
    with Peer(server) as peer:
        peer.send(peer.headers(1, "/inference.GRPCInferenceService/ModelStreamInfer"))
        for number in range(100):
            ask = message("inference.ModelInferRequest")(model_name="text", id=str(number))
            item = ask.inputs.add(name="text_input", datatype="BYTES", shape=[1])
            item.contents.bytes_contents.append(b"a" * (number * 200))
            blob = ask.SerializeToString()
            peer.send(h2.frame(h2.DATA, 0, 1, b"\0" + len(blob).to_bytes(4, "big") + blob))
        peer.send(h2.frame(h2.DATA, h2.END_STREAM, 1))
        data = b""
        for kind, flags, _, payload in peer.frames():
            data += payload if kind == h2.DATA else b""
            peer.send(h2.window_update(0, 16384) + h2.window_update(1, 16384) if kind == h2.DATA and payload else b"")
            if kind == h2.HEADERS and flags & h2.END_STREAM:
                break
    ids = []
    while data:
        size = int.from_bytes(data[1:5], "big")
        answer = message("inference.ModelStreamInferResponse").FromString(data[5 : 5 + size]).infer_response
        assert answer.raw_output_contents[0][4:] == b"A" * (int(answer.id) * 200)
        ids.append(int(answer.id))
        data = data[5 + size :]
    assert ids == list(range(100))


def test_headers_are_forwarded_and_deadlines_kept() -> None:
    async def listen(front: Front) -> Any:
        return await rest.listen(replace(front, forward="x-.*"), port=0, grpc_only=True)

    with running(listen) as found, Peer(found) as peer:
        blob = echo()
        data = h2.frame(h2.DATA, h2.END_STREAM, 1, b"\0" + len(blob).to_bytes(4, "big") + blob)
        peer.send(peer.headers(1, INFER, ("x-user", "u"), ("grpc-timeout", "1500m")) + data)
        assert peer.status(1)["grpc-status"] == "0"
        assert found.service.seen[-1].headers == {"x-user": "u"}
        assert found.service.seen[-1].parameters == {"x_user": "u"}
        assert found.service.seen[-1].deadline == 1.5


def test_slow_peers_are_dropped() -> None:
    async def main(service: WatchedService) -> None:
        listener = await rest.listen(
            Front(service), port=0, grpc_only=True, limits=ConnectionLimits(head_timeout=0.0, idle=0.0)
        )
        for start in (b"", h2.PREFACE[:9], h2.PREFACE + h2.settings(())):
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write(start)
            with suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 10)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        await listener.close()

    run(main)
