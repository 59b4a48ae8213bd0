"""Lanes of the load generator: raw connections that send prebuilt requests, one at a time each, and read just enough.

They cost the generator as little as can be: a client library would measure itself.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import hpack

from torchship.errors import Unavailable
from torchship.wire import frames as h2

_UPDATE = 1 << 28  # bytes taken before the server's window on the connection is opened again


class Lane(Protocol):
    """One connection with at most one request under way."""

    def fire(self, payload: bytes) -> None:
        """Send a request; the run is told when its answer has come."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


OnAnswer = Callable[[Lane, str, bytes], None]  # "" or the kind of fault, and the body
Connect = Callable[[OnAnswer], Any]  # a coroutine function that opens a Lane


class _Received:
    """What came and was not read yet; joined only when there is enough, so that large answers take linear time."""

    __slots__ = ("_have", "_parts", "need")

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._have = 0
        self.need = 1

    def add(self, data: bytes) -> bytes:
        """All that is there, or nothing while less than `need` bytes are."""
        if not self._parts:
            return data if len(data) >= self.need else self.keep(data, self.need)
        self._parts.append(data)
        self._have += len(data)
        if self._have < self.need:
            return b""
        data = b"".join(self._parts)
        self._parts.clear()
        return data

    def keep(self, rest: bytes, need: int) -> bytes:
        """Give back what was not read, and say how many bytes it takes to go on."""
        self._parts, self._have, self.need = [rest] if rest else [], len(rest), need
        return b""


class HttpLane(asyncio.Protocol):
    """An HTTP/1.1 connection that reads status, Content-Length and the body."""

    def __init__(self, on_answer: OnAnswer) -> None:
        self._on_answer = on_answer
        self._received = _Received()
        self._body = (0, 0)  # where the body begins and ends, once its head is there
        self._status = b""
        self._transport: asyncio.Transport | None = None
        self._open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """A server that hangs up fails the request that is under way."""
        if self._open:
            self._open = False
            self._on_answer(self, "disconnected", b"")

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer."""
        data = self._received.add(data)
        if not data:
            return
        start, end = self._body
        if not end:
            top = data.find(b"\r\n\r\n")
            if top < 0:
                self._received.keep(data, len(data) + 1)
                return
            head = data[:top].lower()
            self._status = head[9:12]
            place = head.find(b"\r\ncontent-length:")
            if place < 0:
                self._on_answer(self, "no Content-Length", b"")
                return
            stop = head.find(b"\r\n", place + 2)
            start = top + 4
            end = start + int(head[place + 17 : stop if stop > 0 else top])
        if len(data) < end:
            self._body = start, end
            self._received.keep(data, end)
            return
        self._body = 0, 0
        self._received.keep(data[end:], 1)
        self._on_answer(self, "" if self._status == b"200" else f"status {self._status.decode()}", data[start:end])

    def fire(self, payload: bytes) -> None:
        """Send one request."""
        if not self._open or self._transport is None:
            asyncio.get_running_loop().call_soon(self._on_answer, self, "disconnected", b"")
            return
        self._transport.write(payload)

    def close(self) -> None:
        """Hang up."""
        self._open = False
        if self._transport is not None:
            self._transport.abort()


class GrpcLane(asyncio.Protocol):
    """One connection of HTTP/2 with one call under way. It offers no header table, so that every header block of the
    server means the same each time and is decoded only once."""

    def __init__(self, on_answer: OnAnswer, *, path: str, authority: str, scheme: str, token: str) -> None:
        self._on_answer = on_answer
        fields = [
            (":method", "POST"), (":scheme", scheme), (":path", path), (":authority", authority),
            ("content-type", "application/grpc"), ("te", "trailers"), ("user-agent", "torchship-bench"),
            *([("authorization", f"Bearer {token}")] if token else []),
        ]  # fmt: skip
        encoder = hpack.Encoder()
        self._first, self._again = encoder.encode(fields), encoder.encode(fields)  # the second is indices only
        self._statuses: dict[bytes, str] = {}
        self._stream = -1
        self._received = _Received()
        self._received.need = 9
        self._body = bytearray()
        self._window = 65535  # of the connection; `_room` that of the stream (RFC 9113 section 6.9.2)
        self._initial = self._room = 65535
        self._frame = 16384
        self._unsent = memoryview(b"")
        self._taken = 0
        self._open = True
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected: say how we want to be talked to (no table, no pushes, windows as wide as they can be)."""
        self._transport = cast(asyncio.Transport, transport)
        settings = h2.settings([(1, 0), (2, 0), (4, h2.MAX_WINDOW), (5, 1 << 20)])
        self._transport.write(h2.PREFACE + settings + h2.window_update(0, h2.MAX_WINDOW - 65535))

    def connection_lost(self, exc: Exception | None) -> None:
        """A server that hangs up fails the call that is under way."""
        if self._open:
            self._open = False
            self._on_answer(self, "disconnected", b"")

    def fire(self, payload: bytes) -> None:
        """Send one call; `payload` is its serialized message."""
        if not self._open or self._transport is None:
            asyncio.get_running_loop().call_soon(self._on_answer, self, "disconnected", b"")
            return
        self._stream += 2
        self._body = bytearray()
        head = h2.frame(h2.HEADERS, h2.END_HEADERS, self._stream, self._first if self._stream == 1 else self._again)
        data = b"\0" + len(payload).to_bytes(4, "big") + payload
        self._room = self._initial
        if len(data) <= min(self._frame, self._window, self._room):
            self._window -= len(data)
            self._transport.write(head + h2.frame(h2.DATA, h2.END_STREAM, self._stream, data))
        else:
            self._transport.write(head)
            self._unsent = memoryview(data)
            self._pump()

    def _pump(self) -> None:
        while self._unsent and self._window > 0 and self._room > 0 and self._transport is not None:
            size = min(self._frame, self._window, self._room, len(self._unsent))
            part, self._unsent = bytes(self._unsent[:size]), self._unsent[size:]
            self._window -= size
            self._room -= size
            self._transport.write(h2.frame(h2.DATA, 0 if self._unsent else h2.END_STREAM, self._stream, part))

    def data_received(self, data: bytes) -> None:
        """Frames of the server."""
        data = self._received.add(data)
        place, size, status = 0, len(data), ""
        while size - place >= 9:
            high, low, kind, flags, number = h2.TOP.unpack_from(data, place)
            start = place + 9
            end = start + (high << 16 | low)
            if end > size:
                break
            place = end
            if number == self._stream and kind == h2.DATA:
                self._body += data[start:end]
                self._took(end - start)
            elif kind == h2.HEADERS and number == self._stream and flags & h2.END_STREAM:
                status = self._status(data[start:end])
            elif kind == h2.RST_STREAM and number == self._stream and any(data[start:end]):
                status = "reset"
            elif kind not in (h2.DATA, h2.HEADERS):
                self._control(kind, flags, number, data[start:end])
        if data:
            rest = data[place:]
            self._received.keep(rest, 9 if len(rest) < 9 else 9 + int.from_bytes(rest[:3], "big"))
        if status:  # last: it fires the next call
            body = bytes(memoryview(self._body)[5:])
            self._on_answer(self, "" if status == "0" else f"grpc-status {status}", body)

    def _status(self, block: bytes) -> str:
        found = self._statuses.get(block)
        if found is None:
            fields = {str(name): str(value) for name, value in hpack.Decoder().decode(block)}
            found = self._statuses[block] = fields.get("grpc-status", "missing")
        return found

    def _took(self, size: int) -> None:
        self._taken += size
        if self._taken > _UPDATE and self._transport is not None:
            self._transport.write(h2.window_update(0, self._taken))
            self._taken = 0

    def _control(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._transport is None:
            return
        if kind == h2.SETTINGS and not flags & h2.ACK:
            for place in range(0, len(payload), 6):
                key, value = (
                    int.from_bytes(payload[place : place + 2], "big"),
                    h2.WORD.unpack_from(payload, place + 2)[0],
                )
                if key == 4:
                    self._room += value - self._initial
                    self._initial = value
                elif key == 5:
                    self._frame = value
            self._transport.write(h2.frame(h2.SETTINGS, h2.ACK, 0))
            self._pump()
        elif kind == h2.PING and not flags & h2.ACK:
            self._transport.write(h2.frame(h2.PING, h2.ACK, 0, payload))
        elif kind == h2.WINDOW_UPDATE:
            step = int.from_bytes(payload, "big")
            if number == 0:
                self._window += step
            elif number == self._stream:
                self._room += step
            self._pump()
        elif kind == h2.GOAWAY:
            self._transport.close()

    def close(self) -> None:
        """Hang up."""
        self._open = False
        if self._transport is not None:
            self._transport.abort()


def http_lanes(host: str, *, port: int, tls: ssl.SSLContext | None = None) -> Connect:
    """Opens HTTP/1.1 lanes to an address."""
    return _opener(HttpLane, host, port, tls, "http/1.1")


def grpc_lanes(
    host: str,
    *,
    port: int,
    path: str = "/inference.GRPCInferenceService/ModelInfer",
    token: str = "",
    tls: ssl.SSLContext | None = None,
) -> Connect:
    """Opens gRPC lanes to an address."""

    def make(on_answer: OnAnswer) -> GrpcLane:
        scheme = "https" if tls else "http"
        return GrpcLane(on_answer, path=path, authority=f"{host}:{port}", scheme=scheme, token=token)

    return _opener(make, host, port, tls, "h2")


def _opener(
    make: Callable[[OnAnswer], Any], host: str, port: int, tls: ssl.SSLContext | None, protocol: str
) -> Connect:
    if tls is not None:
        tls.set_alpn_protocols([protocol])

    async def connect(on_answer: OnAnswer) -> Lane:
        loop = asyncio.get_running_loop()
        try:
            _, lane = await loop.create_connection(lambda: make(on_answer), host, port, ssl=tls)
        except OSError as fault:
            raise Unavailable(f"cannot connect to {host}:{port}: {fault.strerror}", hint="is it serving?") from None
        found: Lane = lane
        return found

    return connect


def http_request(path: str, body: bytes, *, host: str = "localhost", headers: Sequence[tuple[str, str]] = ()) -> bytes:
    """The bytes of a POST."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in (*headers, ("Content-Length", str(len(body)))))
    return f"POST {path} HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n".encode() + body
