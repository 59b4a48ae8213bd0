"""HTTP/1.1 as peers really send it: in pieces, pipelined, compressed, too large, too slow, wrong."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from time import sleep
from typing import Any

import pytest

from tests.unit.protocols.running import WAYS, Running, WatchedService, receivers, run, running
from torchship.errors import Busy, Expired, StageFailed, Unauthenticated, Unavailable
from torchship.serve.api import rest
from torchship.serve.api.front import Front
from torchship.serve.http.listen import Listener
from torchship.serve.http.router import Route
from torchship.serve.http.site import ConnectionLimits

LIMITS = ConnectionLimits(max_body=100_000, head=4096, connections=8, pipelined=4)
ASK = json.dumps({"inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "data": list(range(16))}]}).encode()
BYE = b"GET /bye HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
ECHO = "/v2/models/echo/infer"


@pytest.fixture(scope="module", params=WAYS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    async def hello(exchange: Any) -> None:
        exchange.begin(content_type="text/plain")
        for word in (b"one ", b"two"):
            await asyncio.sleep(0)
            exchange.write(word)
        exchange.end()

    def bye(exchange: Any) -> None:
        exchange.answer(b"bye", content_type="text/plain")

    async def listen(front: Front) -> Listener:
        extra = [Route("GET", "/hello", hello), Route("GET", "/bye", bye)]
        pool = await receivers(request.param)
        return await rest.listen(front, port=0, limits=LIMITS, routes=extra, receivers=pool)

    with running(listen) as found:
        yield found


@pytest.fixture(autouse=True)
def _calm(server: Running) -> Iterator[None]:
    yield
    server.service.fault, server.service.delay = None, 0.0


def talk(server: Running, *pieces: bytes, shut: bool = True, pause: float = 0.02) -> bytes:
    """Send pieces, then read until the server hangs up."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number, piece in enumerate(pieces):
            if number:
                sleep(pause)
            peer.sendall(piece)
        if shut:
            sleep(pause)
            peer.sendall(BYE)
        answer = b""
        while data := peer.recv(65536):
            answer += data
    return answer.rpartition(b"HTTP/1.1 200 OK")[0] if answer.endswith(b"bye") else answer


def post(body: bytes, *headers: str, path: str = ECHO, length: bool = True) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", *headers, *([f"Content-Length: {len(body)}"] if length else [])]
    return "\r\n".join([*lines, "", ""]).encode() + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def parts(answer: bytes) -> tuple[dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")[1:]
    return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}, body


def test_byte_by_byte(server: Running) -> None:
    request = post(ASK)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for place in range(len(request)):
            peer.send(request[place : place + 1])
        assert peer.recv(65536).startswith(b"HTTP/1.1 200 OK")


def test_pipelined_answers_keep_their_order(server: Running) -> None:
    asks = []
    for number in range(10):
        body = ASK[:-1] + b',"id":"%d"}' % number
        asks.append(post(body) if number % 2 else b"GET /v2/models/echo HTTP/1.1\r\nHost: x\r\n\r\n" + post(body))
    server.service.delay = 0.01
    answer = talk(server, b"".join(asks))
    ids = [int(part.split(b'"')[0]) for part in answer.split(b'"id":"')[1:]]
    assert ids == list(range(10))
    assert answer.count(b'"platform"') == 5


def test_chunked_body(server: Running) -> None:
    pieces = [
        b"%x;a=b\r\n" % len(ASK[:50]) + ASK[:50] + b"\r\n",
        b"%X\r\n" % len(ASK[50:]) + ASK[50:],
        b"\r\n0\r\nA: b\r\n\r\n",
    ]
    head = post(b"", "Transfer-Encoding: chunked", length=False)
    answer = talk(server, head + pieces[0], *pieces[1:], post(ASK))
    assert answer.count(b"HTTP/1.1 200 OK") == 2


@pytest.mark.parametrize(
    "chunks", [b"zz\r\n", b"3\r\nabcd\r\n", b"-1\r\n", b"0x3\r\nabc\r\n", b"5" + b"0" * 30 + b"\r\n", b"a" * 2000]
)
def test_wrong_chunks(server: Running, chunks: bytes) -> None:
    assert status(talk(server, post(b"", "Transfer-Encoding: chunked", length=False) + chunks)) == 400


def test_chunks_above_the_limit(server: Running) -> None:
    assert status(talk(server, post(b"", "Transfer-Encoding: chunked", length=False) + b"fffff\r\n")) == 413


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /v2 HTTP/2.5\r\nHost: x\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\nHost: x\n\nGET /v2 HTTP/1.1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\na", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100001\r\n\r\n", 413),
        (b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 5000 + b"\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 200-ok\r\nContent-Length: 1\r\n\r\n", 417),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ],
)
def test_what_is_not_http(server: Running, request_bytes: bytes, expected: int) -> None:
    answer = talk(server, request_bytes, shut=False)
    assert status(answer) in (expected, 501 if expected == 400 else expected)
    headers, body = parts(answer)
    assert headers["connection"] == "close"
    assert json.loads(body)["error"]


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/nope", 404),
        ("GET", "/v2/models/none", 404),
        ("GET", "/v2/models/echo/versions/9", 404),
        ("GET", ECHO, 405),
        ("POST", "/v2", 405),
        ("GET", "/v2/models/..%2f..%2fetc", 400),
        ("GET", "/v2/models/%00", 400),
        ("GET", "/v2/models/" + "a" * 300, 400),
        ("GET", "/v2/health/live", 200),
        ("HEAD", "/v2/health/ready", 200),
        ("GET", "/v2/models/echo/ready", 200),
        ("GET", "/v2/models/echo/versions/1", 200),
        ("GET", "/v2/models/echo/config", 200),
        ("GET", "/v2/models/stats", 200),
        ("GET", "/metrics", 200),
    ],
)
def test_paths(server: Running, method: str, path: str, expected: int) -> None:
    answer = talk(server, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert status(answer) == expected
    headers, body = parts(answer)
    if method == "HEAD":
        assert body == b""
    elif expected >= 400:
        assert json.loads(body)["error"]
    assert ("allow" in headers) == (expected == 405)


def test_keep_alive_and_close(server: Running) -> None:
    old = talk(server, b"GET /v2 HTTP/1.0\r\n\r\n", shut=False)
    assert b"connection: close" in old
    kept = talk(server, b"GET /v2 HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /v2 HTTP/1.0\r\n\r\n", shut=False)
    assert kept.count(b"200 OK") == 2
    asked = talk(server, b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", shut=False)
    assert b"connection: close" in asked


def test_expect_continue(server: Running) -> None:
    head = post(ASK, "Expect: 100-continue")[: -len(ASK)]
    answer = talk(server, head, ASK)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "raw deflate"])
def test_compressed_bodies(server: Running, coding: str) -> None:
    packed = gzip.compress(ASK) if coding == "gzip" else zlib.compress(ASK)
    if coding == "raw deflate":
        packed = packed[2:-4]
    answer = talk(server, post(packed, f"Content-Encoding: {coding.rsplit(maxsplit=1)[-1]}"))
    assert status(answer) == 200


@pytest.mark.parametrize(
    ("packed", "coding", "expected"),
    [
        (gzip.compress(bytes(200_000)), "gzip", 413),
        (gzip.compress(ASK)[:-9], "gzip", 400),
        (b"junk", "gzip", 400),
        (b"junk", "br", 415),
    ],
)
def test_compressed_bodies_that_are_not(server: Running, packed: bytes, coding: str, expected: int) -> None:
    assert status(talk(server, post(packed, f"Content-Encoding: {coding}"))) == expected


@pytest.mark.parametrize("rows", [300, 900])
def test_compressed_answers(server: Running, rows: int) -> None:
    item = {"name": "x", "shape": [rows, 16], "datatype": "FP32", "data": list(range(16)) * rows}
    body = json.dumps({"inputs": [item]}).encode()
    answer = talk(server, post(body, "Accept-Encoding: br, deflate;q=0.5, gzip"))
    headers, packed = parts(answer)
    assert headers["content-encoding"] == "gzip"
    assert json.loads(gzip.decompress(packed))["outputs"][0]["shape"] == [rows, 16]


def test_small_answers_and_metadata_are_never_compressed(server: Running) -> None:
    """A library that announces gzip with every request may undo it for inference alone, and small ones do not pay."""
    item = {"name": "x", "shape": [30, 16], "datatype": "FP32", "data": list(range(16)) * 30}
    small = post(json.dumps({"inputs": [item]}).encode(), "Accept-Encoding: gzip")
    openapi = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\n\r\n"
    for request, least in ((small, 1024), (openapi, 1 << 14)):
        headers, body = parts(talk(server, request))
        assert "content-encoding" not in headers
        assert len(body) > least


def test_streamed_answer(server: Running) -> None:
    answer = talk(server, b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
    headers, body = parts(answer)
    assert headers["transfer-encoding"] == "chunked"
    assert body == b"4\r\none \r\n3\r\ntwo\r\n0\r\n\r\n"
    old = talk(server, b"GET /hello HTTP/1.0\r\n\r\n")
    assert old.endswith(b"\r\n\r\none two")


@pytest.mark.parametrize(
    ("fault", "expected", "says"),
    [
        (Busy("the line is full", retry_after=2.2), 503, "the line is full"),
        (Expired("too late"), 503, "too late"),
        (StageFailed("stage 'model' raised"), 500, "raised"),
        (ValueError("secret /path"), 500, "internal error"),
    ],
)
def test_faults_of_a_model(server: Running, fault: Exception, expected: int, says: str) -> None:
    server.service.fault = fault
    headers, body = parts(answer := talk(server, post(ASK)))
    assert status(answer) == expected
    assert says in json.loads(body)["error"]
    assert headers.get("retry-after") == ("3" if isinstance(fault, Busy) else None)


def test_a_caller_that_leaves_cancels_its_work(server: Running) -> None:
    server.service.delay = 5.0
    before = server.service.cancelled
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as peer:
        peer.sendall(post(ASK))
        sleep(0.1)
    for _ in range(100):
        if server.service.cancelled > before:
            break
        sleep(0.05)
    assert server.service.cancelled == before + 1


def test_too_many_connections(server: Running) -> None:
    peers = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(12)]
    try:
        for peer in peers:
            peer.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        answers = [peer.recv(4096).split(b" ")[1] for peer in peers]
        assert answers.count(b"503") == 4
    finally:
        for peer in peers:
            peer.close()


def test_slow_peers_are_dropped() -> None:
    async def main(service: WatchedService) -> None:
        limits = ConnectionLimits(head_timeout=0.0, body_timeout=0.0, idle=0.0)
        listener = await rest.listen(Front(service), port=0, limits=limits)
        for start, expected in ((b"GET /v2 HT", b"408"), (post(ASK)[:-5], b"408"), (b"", b"")):
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write(start)
            answer = await asyncio.wait_for(reader.read(), 10)
            assert expected in answer
            writer.close()
            await writer.wait_closed()
        await listener.close()

    run(main)


def test_a_reader_that_does_not_read_is_dropped() -> None:
    async def main(service: WatchedService) -> None:
        listener = await rest.listen(Front(service), port=0, limits=ConnectionLimits(write_timeout=0.0))
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port, limit=1000)
        item = {"name": "x", "shape": [20_000, 16], "datatype": "FP32", "data": [0.125] * 320_000}
        ask = post(json.dumps({"inputs": [item]}).encode())
        for _ in range(20):
            writer.write(ask)
        for _ in range(100):
            await asyncio.sleep(0.05)
            writer.write(b"x")
            if writer.transport.is_closing():
                break
        assert writer.transport.is_closing()
        with suppress(ConnectionError):
            assert len(await reader.read(10)) <= 10
        writer.close()
        await listener.close(grace=0.2)

    run(main)


def test_all_bodies_together_are_bounded() -> None:
    async def main(service: WatchedService) -> None:
        listener = await rest.listen(Front(service), port=0, limits=ConnectionLimits(bodies=50_000))
        half = post(bytes(60_000))[:40_000]
        first, second = [await asyncio.open_connection("127.0.0.1", listener.port) for _ in range(2)]
        first[1].write(half)
        await asyncio.sleep(0.05)
        second[1].write(half)
        assert b"503 Service Unavailable" in await asyncio.wait_for(second[0].read(), 10)
        first[1].close()
        await asyncio.sleep(0.05)
        third = await asyncio.open_connection("127.0.0.1", listener.port)
        third[1].write(post(ASK)[:-9])
        await asyncio.sleep(0.05)
        third[1].write(post(ASK)[-9:])
        assert (await third[0].readline()).startswith(b"HTTP/1.1 200")
        for _, writer in (second, third):
            writer.close()
        await listener.close()

    run(main)


def test_closing_waits_for_answers() -> None:
    async def main(service: WatchedService) -> None:
        service.delay = 0.2
        listener = await rest.listen(Front(service), port=0)
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(post(ASK))
        await asyncio.sleep(0.05)
        await listener.close()
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
        writer.close()

    run(main)


def test_a_port_in_use(server: Running) -> None:
    with pytest.raises(Unavailable, match="cannot listen"):
        run(lambda service: rest.listen(Front(service), port=server.port))


def test_admission() -> None:
    def admit(scope: str, headers: Any) -> None:
        if scope == "infer" and headers.get("authorization") != "Bearer t":
            raise Unauthenticated("no token")

    async def listen(front: Front) -> Listener:
        return await rest.listen(front, port=0, admit=admit)

    with running(listen) as found:
        refused = talk(found, post(ASK))
        assert status(refused) == 401
        assert b"www-authenticate: Bearer" in refused
        assert status(talk(found, post(ASK, "Authorization: Bearer t"))) == 200
        assert status(talk(found, b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")) == 200


def half_closed(server: Running, *asked: bytes, wait: float = 0.0) -> bytes:
    """Everything that is answered to a peer that sends no more."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as peer:
        peer.sendall(b"".join(asked))
        peer.shutdown(socket.SHUT_WR)
        server.service.delay = wait
        answer = b""
        while data := peer.recv(65536):
            answer += data
    return answer


def test_who_sends_no_more_is_answered_and_then_closed(server: Running) -> None:
    """RFC 9112 section 9.6; however many requests it has sent, and only those that it has sent in full."""
    server.service.delay = 0.3
    assert status(half_closed(server, post(ASK), wait=0.3)) == 200
    assert half_closed(server, post(ASK) * 10, wait=0.02).count(b"HTTP/1.1 200 OK") == 10
    assert half_closed(server, post(ASK), post(ASK)[:-5], wait=0.02).count(b"HTTP/1.1 200 OK") == 1
    assert half_closed(server, post(ASK)[:-5]) == b""
    server.service.delay = 2.5
    answer = half_closed(server, post(ASK), wait=2.5)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")  # asked whether it listens


def test_other_origins() -> None:
    async def listen(front: Front) -> Listener:
        return await rest.listen(front, port=0, cors_origins=["http://localhost:3000"])

    asks = "Access-Control-Request-Method: POST"
    with running(listen) as found:
        for origin, allowed in (("http://localhost:3000", True), ("http://evil.org", False)):
            lines = f"Host: x\r\nOrigin: {origin}\r\n"
            preflight = (
                f"OPTIONS {ECHO} HTTP/1.1\r\n{lines}{asks}\r\nAccess-Control-Request-Headers: content-type\r\n\r\n"
            )
            headers, _ = parts(answer := talk(found, preflight.encode()))
            assert status(answer) == (200 if allowed else 403)
            assert headers.get("access-control-allow-headers") == ("content-type" if allowed else None)
            for request in (post(ASK, f"Origin: {origin}"), f"GET /nope HTTP/1.1\r\n{lines}\r\n".encode()):
                headers, _ = parts(talk(found, request))
                assert headers.get("access-control-allow-origin") == (origin if allowed else None)
                assert headers["vary"] == "origin"


def test_connections_have_an_age() -> None:
    async def listen(front: Front) -> Listener:
        return await rest.listen(front, port=0, limits=ConnectionLimits(max_connection_age=0.5))

    with running(listen) as found, socket.create_connection(("127.0.0.1", found.port), timeout=10) as peer:
        said: list[str] = []
        while "close" not in said and len(said) < 100:
            sleep(0.1)
            peer.sendall(post(ASK))
            said.append(parts(peer.recv(65536))[0].get("connection", ""))
        assert said[0] == ""
        assert said[-1] == "close"
        assert peer.recv(1) == b""


def test_a_slow_but_steady_sender_is_not_cut() -> None:
    async def listen(front: Front) -> Listener:
        return await rest.listen(front, port=0, limits=ConnectionLimits(body_timeout=1.5))

    request = post(ASK)
    cuts = [request[:-80], *[request[place : place + 16] for place in range(len(request) - 80, len(request), 16)]]
    with running(listen) as found:
        assert status(talk(found, *cuts, pause=0.8)) == 200
        assert status(talk(found, cuts[0], b"", pause=4.0)) == 408


def test_a_slow_but_steady_reader_is_not_cut() -> None:
    """The limit counts from the last byte that moved: whoever reads on gets all, however long it takes."""

    async def listen(front: Front) -> Listener:
        return await rest.listen(front, port=0, limits=ConnectionLimits(write_timeout=3.0))

    item = {"name": "x", "shape": [20_000, 16], "datatype": "FP32", "data": [0.125] * 320_000}
    request = post(json.dumps({"inputs": [item]}).encode())
    count = 6
    with running(listen) as found, socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        peer.settimeout(20)
        peer.connect(("127.0.0.1", found.port))
        sender = threading.Thread(target=peer.sendall, args=(request * count,))
        sender.start()
        answer = bytearray()
        while len(answer) < count * 6 * 320_000:
            data = peer.recv(131_072)
            assert data, f"cut after {len(answer)} bytes"
            answer += data
            sleep(0.02)
        sender.join()
    assert answer.count(b"HTTP/1.1 200 OK") == count


def test_long_json_is_read_while_others_are_answered() -> None:
    """In pieces, in a thread: the values and the faults are those of short JSON."""

    async def listen(front: Front) -> Listener:
        return await rest.listen(front, port=0)

    rows = 20_000
    numbers = ",".join(str(number % 997) for number in range(rows * 16))
    text = '{"inputs":[{"name":"x","shape":[%d,16],"datatype":"FP32","data":[%s]}]}'
    with running(listen) as found:
        long = post((text % (rows, numbers)).encode())
        assert len(long) > 1 << 20
        _, body = parts(answer := talk(found, long + post(ASK), pause=1.0))
        assert status(answer) == 200
        data = json.loads(body.partition(b"HTTP/1.1")[0])["outputs"][0]["data"]
        assert data == [number % 997 for number in range(rows * 16)]
        assert answer.count(b"HTTP/1.1 200 OK") == 2
        for wrong, said in ((",", "malformed"), (",,1", "malformed"), (',"a"', "'x'"), (",1e39", "'x'"), (",1", "'x'")):
            refused = talk(found, post((text % (rows, numbers + wrong)).encode()))
            assert status(refused) == 400
            assert said in json.loads(parts(refused)[1].partition(b"HTTP/1.1")[0])["error"]
