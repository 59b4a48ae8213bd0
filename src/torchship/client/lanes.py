"""Lanes of the load generator: raw connections that send prebuilt requests, one at a time each, and read just enough.

They cost the generator as little as can be: a client library would measure itself.
"""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import Callable
from typing import TypeAlias, cast

import hpack

from torchship.wire import frames as h2

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_UPDATE = 1 << 28  # bytes taken before the server's window on the connection is opened again

# What was not read yet, how many bytes it takes to go on, what to send (None: hang up), and an answer, if one is there:
# "" or the kind of its fault, and its body.
Progress: TypeAlias = tuple[bytes, int, bytes | None, tuple[str, bytes] | None]


class Lane(asyncio.Protocol):
    """One connection with at most one request under way; `calls` knows the protocol.

    `on_answer` is told the lane, "" or the kind of fault, and the body of each answer.
    """

    def __init__(self, calls: HttpCalls | GrpcCalls, on_answer: OnAnswer) -> None:
        self._calls, self._on_answer = calls, on_answer
        self._parts: list[bytes] = []  # joined only when there is enough, so that large answers take linear time
        self._have, self._need = 0, 1
        self._open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._calls.hello)

    def connection_lost(self, exc: Exception | None) -> None:
        """A server that hangs up fails the request that is under way."""
        if self._open:
            self._open = False
            self._on_answer(self, "disconnected", b"")

    def fire(self, payload: bytes) -> None:
        """Send a request."""
        if self._open:
            self._transport.write(self._calls.ask(payload))
        else:
            asyncio.get_running_loop().call_soon(self._on_answer, self, "disconnected", b"")

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer."""
        self._parts.append(data)
        self._have += len(data)
        if self._have < self._need:
            return
        rest, self._need, reply, answer = self._calls.read(b"".join(self._parts))
        self._parts, self._have = [rest] if rest else [], len(rest)
        if reply is None:
            self._transport.close()
        elif reply:
            self._transport.write(reply)
        if answer is not None:  # last: it fires the next request
            self._on_answer(self, *answer)

    def close(self) -> None:
        """Hang up."""
        self._open = False
        self._transport.abort()


OnAnswer: TypeAlias = Callable[[Lane, str, bytes], None]


class HttpCalls:
    """Whole requests of HTTP/1.1; of an answer it reads status, Content-Length and body."""

    hello = b""

    def __init__(self) -> None:
        self._body = (0, 0)  # where the body begins and ends, once its head is there
        self._status = ""

    def ask(self, payload: bytes) -> bytes:
        """The bytes of a request."""
        return payload

    def read(self, data: bytes) -> Progress:
        """Take in bytes of an answer."""
        start, end = self._body
        if not end:
            top = data.find(b"\r\n\r\n")
            if top < 0:
                return data, len(data) + 1, b"", None
            found = _LENGTH.search(data, 0, top)
            if found is None:
                return b"", 1, b"", ("no Content-Length", b"")
            self._status = data[9:12].decode("latin-1")
            start = top + 4
            end = start + int(found[1])
        if len(data) < end:
            self._body = start, end
            return data, end, b"", None
        self._body = 0, 0
        return data[end:], 1, b"", ("" if self._status == "200" else f"status {self._status}", data[start:end])


class GrpcCalls:
    """Calls of gRPC on one connection of HTTP/2, one at a time, each given as its serialized message.

    It offers no header table, so that every header block of the server means the same each time and is decoded once;
    no pushes, and windows as wide as they can be.
    """

    hello = (
        h2.PREFACE
        + h2.settings([(1, 0), (2, 0), (4, h2.MAX_WINDOW), (5, 1 << 20)])
        + h2.window_update(0, h2.MAX_WINDOW - 65535)
    )

    def __init__(self, *, path: str, authority: str, scheme: str, token: str) -> None:
        fields = [
            (":method", "POST"), (":scheme", scheme), (":path", path), (":authority", authority),
            ("content-type", "application/grpc"), ("te", "trailers"), ("user-agent", "torchship-bench"),
            *([("authorization", f"Bearer {token}")] if token else []),
        ]  # fmt: skip
        encoder = hpack.Encoder()
        self._first, self._again = encoder.encode(fields), encoder.encode(fields)  # the second is indices only
        self._statuses: dict[bytes, str] = {}
        self._stream = -1
        self._body = bytearray()
        self._window = 65535  # of the connection; `_room` that of the stream (RFC 9113 section 6.9.2)
        self._initial = self._room = 65535
        self._frame = 16384
        self._unsent = memoryview(b"")
        self._taken = 0

    def ask(self, payload: bytes) -> bytes:
        """The frames of a call, as far as the server's windows let it."""
        self._stream += 2
        self._body = bytearray()
        self._room = self._initial
        head = h2.frame(h2.HEADERS, h2.END_HEADERS, self._stream, self._first if self._stream == 1 else self._again)
        data = b"\0" + len(payload).to_bytes(4, "big") + payload
        if len(data) <= min(self._frame, self._window, self._room):
            self._window -= len(data)
            return head + h2.frame(h2.DATA, h2.END_STREAM, self._stream, data)
        self._unsent = memoryview(data)
        return head + self._data()

    def _data(self) -> bytes:
        """Frames of what is not sent yet."""
        frames = []
        while self._unsent and self._window > 0 and self._room > 0:
            size = min(self._frame, self._window, self._room, len(self._unsent))
            part, self._unsent = bytes(self._unsent[:size]), self._unsent[size:]
            self._window -= size
            self._room -= size
            frames.append(h2.frame(h2.DATA, 0 if self._unsent else h2.END_STREAM, self._stream, part))
        return b"".join(frames)

    def read(self, data: bytes) -> Progress:
        """Take in frames of the server."""
        place, status, hang_up, reply = 0, "", False, b""
        while len(data) - place >= 9:
            high, low, kind, flags, number = h2.TOP.unpack_from(data, place)
            start = place + 9
            end = start + (high << 16 | low)
            if end > len(data):
                break
            place, mine = end, number == self._stream
            if kind == h2.DATA and mine:
                self._body += data[start:end]
                self._taken += end - start
            elif kind == h2.HEADERS and mine and flags & h2.END_STREAM:
                status = self._status(data[start:end])
            elif kind == h2.RST_STREAM and mine and any(data[start:end]):
                status = "reset"
            elif kind == h2.GOAWAY:
                hang_up = True
            elif kind not in (h2.DATA, h2.HEADERS):
                reply += self._control(kind, flags, number, data[start:end])
        if self._unsent:
            reply += self._data()
        if self._taken > _UPDATE:
            reply += h2.window_update(0, self._taken)
            self._taken = 0
        rest, answer = data[place:], None
        need = 9 if len(rest) < 9 else 9 + int.from_bytes(rest[:3], "big")
        if status:
            answer = "" if status == "0" else f"grpc-status {status}", bytes(memoryview(self._body)[5:])
        return rest, need, None if hang_up else reply, answer

    def _status(self, block: bytes) -> str:
        found = self._statuses.get(block)
        if found is None:
            fields = {str(name): str(value) for name, value in hpack.Decoder().decode(block)}
            found = self._statuses[block] = fields.get("grpc-status", "missing")
        return found

    def _control(self, kind: int, flags: int, number: int, payload: bytes) -> bytes:
        """Take in a frame that is about the connection or a window; what to reply."""
        if kind == h2.SETTINGS and not flags & h2.ACK:
            for key, value in struct.iter_unpack(">HI", payload):
                if key == 4:
                    self._room += value - self._initial
                    self._initial = value
                elif key == 5:
                    self._frame = value
            return h2.frame(h2.SETTINGS, h2.ACK, 0)
        if kind == h2.PING and not flags & h2.ACK:
            return h2.frame(h2.PING, h2.ACK, 0, payload)
        if kind == h2.WINDOW_UPDATE and number in (0, self._stream):
            step = int.from_bytes(payload, "big")
            self._window += 0 if number else step
            self._room += step if number else 0
        return b""
