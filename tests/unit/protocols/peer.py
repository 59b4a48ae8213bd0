"""A client of HTTP/2 that can send whatever it likes."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

import hpack

from tests.unit.protocols.running import Running
from torchship.wire import frames as h2

LIVE = "/inference.GRPCInferenceService/ServerLive"


class Peer:
    """A client that can send whatever it likes."""

    def __init__(self, server: Running, *, greet: bool = True, settings: tuple[tuple[int, int], ...] = ()) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        self.buffer = b""
        if greet:
            self.send(h2.PREFACE + h2.settings(settings))

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        with suppress(ConnectionError):
            self.socket.sendall(data)

    def headers(self, number: int, path: str = LIVE, *extra: tuple[str, str], flags: int = h2.END_HEADERS) -> bytes:
        fields = [
            (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"),
            ("content-type", "application/grpc"), ("te", "trailers"), *extra,
        ]  # fmt: skip
        return h2.frame(h2.HEADERS, flags, number, self.encoder.encode(fields))

    def call(self, number: int, path: str = LIVE, body: bytes = b"") -> bytes:
        data = b"\0" + len(body).to_bytes(4, "big") + body
        return self.headers(number, path) + h2.frame(h2.DATA, h2.END_STREAM, number, data)

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Frames until the server hangs up."""
        while True:
            while len(self.buffer) >= 9:
                size = int.from_bytes(self.buffer[:3], "big")
                if len(self.buffer) < 9 + size:
                    break
                kind, flags, number = struct.unpack(">BBI", self.buffer[3:9])
                payload, self.buffer = self.buffer[9 : 9 + size], self.buffer[9 + size :]
                yield kind, flags, number, payload
            try:
                data = self.socket.recv(65536)
            except ConnectionError:
                return
            if not data:
                return
            self.buffer += data

    def until(self, wanted: int, number: int | None = None) -> tuple[int, bytes]:
        """Flags and payload of the first frame of a kind, on a stream; header blocks on the way are decoded."""
        for kind, flags, stream, payload in self.frames():
            if kind == wanted and number in (None, stream):
                return flags, payload
        raise AssertionError(f"no frame of kind {wanted}")

    def status(self, number: int) -> dict[str, str]:
        """All header fields of a stream, up to its end."""
        found: dict[str, str] = {}
        for kind, flags, stream, payload in self.frames():
            if kind == h2.HEADERS and stream == number:
                found |= {str(name): str(value) for name, value in self.decoder.decode(payload)}
            if stream == number and flags & h2.END_STREAM and kind in (h2.DATA, h2.HEADERS):
                return found
        raise AssertionError("the stream did not end")

    def goaway(self) -> int:
        return int.from_bytes(self.until(h2.GOAWAY)[1][4:8], "big")

    def reset(self, number: int) -> int:
        return int.from_bytes(self.until(h2.RST_STREAM, number)[1], "big")
