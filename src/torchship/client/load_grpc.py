"""gRPC lanes for the load generator: prebuilt calls on a raw HTTP/2 connection, one call at a time each."""

from __future__ import annotations

import asyncio
import ssl
import struct
from typing import cast

import hpack

from torchship.client.load import Connect, Landed, Lane
from torchship.errors import Unavailable

_TOP = struct.Struct(">BHBBI")
_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_BIG = 2**31 - 1


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return _TOP.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


class GrpcLane(asyncio.Protocol):
    """One connection of HTTP/2 with one call under way. It offers no header table, so that every header block of the
    server means the same each time and is decoded only once."""

    def __init__(self, landed: Landed, *, path: str, authority: str, token: str = "") -> None:
        self._landed = landed
        fields = [
            (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", authority),
            ("content-type", "application/grpc"), ("te", "trailers"), ("user-agent", "torchship-bench"),
            *([("authorization", f"Bearer {token}")] if token else []),
        ]  # fmt: skip
        encoder = hpack.Encoder()
        self._first = encoder.encode(fields)
        self._again = encoder.encode(fields)  # nothing but indices now
        self._blocks: dict[bytes, str] = {}
        self._stream = -1
        self._buffer = b""
        self._parts: list[bytes] = []
        self._have = 0
        self._need = 9
        self._body = bytearray()
        self._window = 65535
        self._initial = self._room = 65535
        self._frame = 16384
        self._waiting = b""
        self._fresh = True
        self._taken = 0
        self._open = True
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected: say how we want to be talked to."""
        self._transport = cast(asyncio.Transport, transport)
        settings = struct.pack(">HIHIHIHI", 1, 0, 2, 0, 4, _BIG, 5, 1 << 20)
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, 0, settings)
        self._transport.write(preface + _frame(_WINDOW, 0, 0, (_BIG - 65535).to_bytes(4, "big")))

    def connection_lost(self, exc: Exception | None) -> None:
        """A server that hangs up fails the call that is under way."""
        if self._open:
            self._open = False
            self._landed(self, "disconnected", b"")

    def fire(self, payload: bytes) -> None:
        """Send one call; `payload` is its serialized message."""
        if not self._open or self._transport is None:
            asyncio.get_running_loop().call_soon(self._landed, self, "disconnected", b"")
            return
        self._stream += 2
        self._body = bytearray()
        block = self._first if self._fresh else self._again
        self._fresh = False
        head = _frame(_HEADERS, 4, self._stream, block)
        data = b"\0" + len(payload).to_bytes(4, "big") + payload
        if len(data) <= min(self._frame, self._window, self._initial):
            self._window -= len(data)
            self._transport.write(head + _frame(_DATA, 1, self._stream, data))
        else:
            self._transport.write(head)
            self._waiting = data
            self._room = self._initial
            self._pump()

    def _pump(self) -> None:
        while self._waiting and self._window > 0 and self._room > 0 and self._transport is not None:
            size = min(self._frame, self._window, self._room, len(self._waiting))
            part, self._waiting = self._waiting[:size], self._waiting[size:]
            self._window -= size
            self._room -= size
            self._transport.write(_frame(_DATA, 0 if self._waiting else 1, self._stream, part))

    def data_received(self, data: bytes) -> None:
        """Frames of the server."""
        if self._buffer or self._parts:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return
            data = b"".join((self._buffer, *self._parts))
            self._parts.clear()
        self._buffer = buffer = data
        place, size = 0, len(buffer)
        self._need = 9
        while size - place >= 9:
            high, low, kind, flags, number = _TOP.unpack_from(buffer, place)
            start = place + 9
            end = start + (high << 16 | low)
            if end > size:
                self._need = end - place
                break
            place = end
            if number == self._stream and kind == _DATA:
                self._body += buffer[start:end]
                self._took(end - start)
            elif kind == _HEADERS and number == self._stream and flags & 1:
                self._buffer = buffer[place:]
                self._land(self._status(buffer[start:end]))
                buffer, place = self._buffer, 0
                size = len(buffer)
            elif kind not in (_DATA, _HEADERS):
                self._control(kind, flags, number, buffer[start:end])
        self._buffer = buffer[place:]
        self._have = len(self._buffer)

    def _land(self, status: str) -> None:
        body, self._body = bytes(memoryview(self._body)[5:]), bytearray()
        self._landed(self, "" if status == "0" else f"grpc-status {status}", body)

    def _status(self, block: bytes) -> str:
        found = self._blocks.get(block)
        if found is None:
            fields = {str(name): str(value) for name, value in hpack.Decoder().decode(block)}
            found = self._blocks[block] = fields.get("grpc-status", "missing")
        return found

    def _took(self, size: int) -> None:
        self._taken += size
        if self._taken > 1 << 28 and self._transport is not None:
            self._transport.write(_frame(_WINDOW, 0, 0, self._taken.to_bytes(4, "big")))
            self._taken = 0

    def _control(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._transport is None:
            return
        if kind == _SETTINGS and not flags & 1:
            for place in range(0, len(payload), 6):
                key, value = struct.unpack_from(">HI", payload, place)
                if key == 4:
                    self._room += value - self._initial
                    self._initial = value
                elif key == 5:
                    self._frame = value
            self._transport.write(_frame(_SETTINGS, 1, 0))
            self._pump()
        elif kind == _PING and not flags & 1:
            self._transport.write(_frame(_PING, 1, 0, payload))
        elif kind == _WINDOW:
            step = int.from_bytes(payload, "big")
            if number == 0:
                self._window += step
            elif number == self._stream:
                self._room += step
            self._pump()
        elif kind == _RST and number == self._stream:
            if int.from_bytes(payload, "big"):
                self._land("reset")
        elif kind == _GOAWAY:
            self._transport.close()

    def close(self) -> None:
        """Hang up."""
        self._open = False
        if self._transport is not None:
            self._transport.abort()


def grpc_lanes(
    host: str,
    *,
    port: int,
    path: str = "/inference.GRPCInferenceService/ModelInfer",
    token: str = "",
    tls: ssl.SSLContext | None = None,
) -> Connect:
    """Opens gRPC lanes to an address."""

    async def connect(landed: Landed) -> Lane:
        loop = asyncio.get_running_loop()
        try:
            _, lane = await loop.create_connection(
                lambda: GrpcLane(landed, path=path, authority=f"{host}:{port}", token=token), host, port, ssl=tls
            )
        except OSError as fault:
            raise Unavailable(f"cannot connect to {host}:{port}: {fault.strerror}", hint="is it serving?") from None
        return lane

    return connect
