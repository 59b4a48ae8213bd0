"""Frames of HTTP/2: their numbers, their bytes, and the two ways they can be wrong. Source: RFC 9113."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from torchship.wire.raw import read_varint, varint

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS, PADDED, PRIORITY_FLAG, ACK = 0x1, 0x4, 0x8, 0x20, 0x1
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 2, 3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 5, 6, 7, 8, 9, 11
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
TOP = struct.Struct(">BHBBI")  # length (24 bits in two), type, flags, stream
WORD = struct.Struct(">I")
MAX_WINDOW = 2**31 - 1


class StreamFault(Exception):
    """One stream is wrong: it is reset, the connection lives on."""

    def __init__(self, stream: int, code: int) -> None:
        super().__init__(stream, code)
        self.stream, self.code = stream, code


class ConnectionFault(Exception):
    """The peer broke the protocol: the connection ends with GOAWAY."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """The bytes of one frame."""
    size = len(payload)
    return TOP.pack(size >> 16, size & 0xFFFF, kind, flags, stream) + payload


def settings(pairs: Iterable[tuple[int, int]]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", key, value) for key, value in pairs))


def window_update(stream: int, size: int) -> bytes:
    """A WINDOW_UPDATE frame."""
    return frame(WINDOW_UPDATE, 0, stream, WORD.pack(size))


def reset(stream: int, code: int) -> bytes:
    """A RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream, WORD.pack(code))


def goaway(last: int, code: int, reason: str = "") -> bytes:
    """A GOAWAY frame."""
    return frame(GOAWAY, 0, 0, WORD.pack(last) + WORD.pack(code) + reason.encode())


def literal(name: bytes, value: bytes) -> bytes:
    """A header field that touches no table, without Huffman coding (RFC 7541 section 6.2.2)."""
    return b"\x00" + integer(len(name)) + name + integer(len(value)) + value


def status_field(status: int) -> bytes:
    """The :status field: from the static table where it is there."""
    known = {200: 8, 204: 9, 206: 10, 304: 11, 400: 12, 404: 13, 500: 14}
    if status in known:
        return bytes([0x80 | known[status]])
    return b"\x08\x03" + str(status).encode()


def integer(value: int, *, bits: int = 7, flags: int = 0) -> bytes:
    """An integer behind the `flags` of its first byte, whose lowest `bits` it begins in (RFC 7541 section 5.1)."""
    top = (1 << bits) - 1
    return bytes((flags | value,)) if value < top else bytes((flags | top,)) + varint(value - top)


def read_integer(block: bytes, place: int, *, bits: int = 7) -> tuple[int, int]:
    """The integer whose first byte is at `place`, and the place after it; what never ends lies beyond the block."""
    top = (1 << bits) - 1
    value = block[place] & top
    if value < top:
        return value, place + 1
    more, place = read_varint(block, place + 1)
    return top + more, place
