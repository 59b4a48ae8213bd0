"""Frames of HTTP/2 (RFC 9113 sections 4 to 6), found in the bytes of a connection, checked, and counted; and their
header blocks to Heads: those of a steady client are decoded once and then known by their bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import hpack

from torchship.serve.http.exchange import Head
from torchship.wire import frames as h2
from torchship.wire.frames import ConnectionFault, StreamFault, read_integer

FRAME = 1 << 18  # the largest frame that we take
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_HOP_BY_HOP = {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


class Reader:
    """Collects what comes until a frame is complete; a large one is joined once, not once per piece."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._have = 0
        self._need = len(h2.PREFACE)
        self.started = False

    def frames(self, data: bytes) -> Iterator[tuple[int, int, int, bytes, int, int]]:
        """Type, flags, stream, and where the payload lies. Raises ConnectionFault for what is not HTTP/2."""
        self._have += len(data)
        if self._parts:
            self._parts.append(data)
            if self._have < self._need and self.started:
                return
            data = b"".join(self._parts)
            self._parts.clear()
        place, size = 0, len(data)
        if not self.started:
            if not h2.PREFACE.startswith(data[: len(h2.PREFACE)]):
                raise ConnectionFault(h2.PROTOCOL_ERROR, "this port speaks HTTP/2 with prior knowledge or ALPN")
            if size >= len(h2.PREFACE):
                self.started, place = True, len(h2.PREFACE)
        while size - place >= 9 and self.started:
            high, low, kind, flags, number = h2.TOP.unpack_from(data, place)
            end = place + 9 + (high << 16 | low)
            if end - place - 9 > FRAME:
                raise ConnectionFault(h2.FRAME_SIZE_ERROR, "a frame is too large")
            if end > size:
                break
            yield kind, flags, number & 0x7FFFFFFF, data, place + 9, end
            place = end
        self._have = size - place
        self._need = 9
        if self._have >= 9 and self.started:
            self._need = 9 + int.from_bytes(data[place : place + 3], "big")
        if self._have:
            self._parts.append(data[place:] if place else data)


_SIZES = {h2.RST_STREAM: 4, h2.WINDOW_UPDATE: 4, h2.PING: 8}
_OF_THE_CONNECTION = (h2.SETTINGS, h2.PING, h2.GOAWAY)
_OF_A_STREAM = (h2.RST_STREAM, h2.PRIORITY, h2.CONTINUATION)


def check(kind: int, flags: int, number: int, payload: bytes) -> None:
    """Raises ConnectionFault, or StreamFault for a fault of one stream only."""
    if kind == h2.PUSH_PROMISE:
        raise ConnectionFault(h2.PROTOCOL_ERROR, "a client cannot push")
    if (number and kind in _OF_THE_CONNECTION) or (not number and kind in _OF_A_STREAM):
        raise ConnectionFault(h2.PROTOCOL_ERROR, "a frame on the wrong stream")
    size = len(payload)
    if size != _SIZES.get(kind, size):
        raise ConnectionFault(h2.FRAME_SIZE_ERROR, "a frame has the wrong size")
    if kind == h2.SETTINGS and (size % 6 or (flags & h2.ACK and size)):
        raise ConnectionFault(h2.FRAME_SIZE_ERROR, "SETTINGS of the wrong size")
    if kind == h2.GOAWAY and size < 8:
        raise ConnectionFault(h2.FRAME_SIZE_ERROR, "GOAWAY of the wrong size")
    if kind == h2.PRIORITY:
        if size != 5:
            raise StreamFault(number, h2.FRAME_SIZE_ERROR)
        if h2.WORD.unpack_from(payload)[0] & 0x7FFFFFFF == number:
            raise StreamFault(number, h2.PROTOCOL_ERROR)


def unpad(data: bytes, start: int, end: int) -> tuple[int, int]:
    """Where the payload of a padded frame lies. Raises ConnectionFault."""
    if start == end or data[start] > end - start - 1:
        raise ConnectionFault(h2.PROTOCOL_ERROR, "padding is longer than its frame")
    return start + 1, end - data[start]


def header_block(flags: int, number: int, data: bytes, start: int, end: int) -> bytes:
    """The part of a header block that a HEADERS frame holds. Raises ConnectionFault."""
    if flags & h2.PADDED:
        start, end = unpad(data, start, end)
    if flags & h2.PRIORITY_FLAG:
        if end - start < 5 or h2.WORD.unpack_from(data, start)[0] & 0x7FFFFFFF == number:
            raise ConnectionFault(h2.PROTOCOL_ERROR, "a wrong priority")
        start += 5
    if not number & 1:
        raise ConnectionFault(h2.PROTOCOL_ERROR, "a client's stream has an odd number")
    return data[start:end]


@dataclass(slots=True)
class Unfinished:
    """A header block that comes in several frames; how many and how long they are is bounded."""

    number: int
    flags: int
    data: bytes
    limit: int
    left: int = 64

    def add(self, payload: bytes) -> None:
        """One more piece. Raises ConnectionFault."""
        self.data += payload
        self.left -= 1
        if len(self.data) > self.limit or self.left < 0:
            raise ConnectionFault(h2.ENHANCE_YOUR_CALM, "the header block is too large")


# a second and connection, with a burst of ten times that
_ALLOWED = {
    h2.RST_STREAM: 100.0,
    h2.SETTINGS: 10.0,
    h2.PING: 200.0,
    h2.PRIORITY: 200.0,
    h2.CONTINUATION: 1000.0,
    h2.HEADERS: 500.0,
    h2.DATA: 200.0,
    h2.WINDOW_UPDATE: 20_000.0,
}


class Pace:
    """Counts costly frames of one connection; each kind has a bucket that refills once a second."""

    def __init__(self) -> None:
        self._counts: dict[int, float] = {}
        self._now = 0.0

    def count(self, kind: int, now: float) -> None:
        """One more frame of a kind. Raises ConnectionFault ENHANCE_YOUR_CALM when it is too many."""
        if now != self._now:
            gone, self._now = now - self._now, now
            self._counts = {
                each: left
                for each, used in self._counts.items()
                if (left := used - _ALLOWED.get(each, 100.0) * gone) > 0
            }
        used = self._counts.get(kind, 0.0) + 1
        self._counts[kind] = used
        if used > 10 * _ALLOWED.get(kind, 100.0):
            raise ConnectionFault(h2.ENHANCE_YOUR_CALM, "too many frames that cost more than they say")


class WrongHead(Exception):
    """The fields of one stream do not make a request: PROTOCOL_ERROR for that stream."""


class Fields:
    """Decodes the header blocks of one connection, in order.

    A block that only looks things up in the table, and does not change it, means the same as long as no other block
    changes the table: such blocks are cached by their bytes until then.
    """

    def __init__(self, *, limit: int) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=limit)
        self._decoder.max_allowed_table_size = 4096
        self.known: dict[bytes, Head] = {}

    def decode(self, block: bytes) -> list[tuple[bytes, bytes]]:
        """The fields of a block. Raises ConnectionFault: the table is lost after a block that cannot be read."""
        try:
            fields = self._decoder.decode(block, raw=True)
        except hpack.OversizedHeaderListError:
            raise ConnectionFault(h2.ENHANCE_YOUR_CALM, "the header list is too large") from None
        except (hpack.HPACKError, ValueError, IndexError):
            raise ConnectionFault(h2.COMPRESSION_ERROR, "the header block cannot be read") from None
        return [(bytes(name), bytes(value)) for name, value in fields]

    def remember(self, block: bytes, head: Head | None = None) -> None:
        """Keep the head of a block, where it has one, that left the table as it was; forget all where it did not."""
        if changes_table(block):
            self.known.clear()
        elif head is not None and len(block) <= 512:
            if len(self.known) >= 64:
                self.known.clear()
            self.known[block] = head


def changes_table(block: bytes) -> bool:
    """Whether any representation in a valid block adds to the dynamic table or resizes it."""
    place, size = 0, len(block)
    while place < size:
        first = block[place]
        if first & 0x80:
            _, place = read_integer(block, place)
        elif first & 0x40 or first & 0x20:
            return True
        else:
            index, place = read_integer(block, place, bits=4)
            for _ in range(1 if index else 2):
                length, place = read_integer(block, place)
                place += length
    return False


def head_of(fields: list[tuple[bytes, bytes]]) -> Head:
    """The Head of a request. Raises WrongHead for what RFC 9113 section 8.2 and 8.3 call malformed."""
    pseudo: dict[bytes, bytes] = {}
    headers: dict[str, str] = {}
    for name, value in fields:
        if name[:1] == b":":
            if headers or name in pseudo or name not in (b":method", b":scheme", b":path", b":authority"):
                raise WrongHead
            pseudo[name] = value
            continue
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value) or name in _HOP_BY_HOP:
            raise WrongHead
        if name == b"te" and value != b"trailers":
            raise WrongHead
        key, text = name.decode(), value.decode("latin-1")
        if key in headers:
            if key in ("content-length", "host", "authorization"):
                raise WrongHead
            text = headers[key] + ("; " if key == "cookie" else ", ") + text
        headers[key] = text
    path = pseudo.get(b":path", b"")
    if not pseudo.get(b":method") or b":scheme" not in pseudo or path[:1] != b"/":
        raise WrongHead
    target, _, query = path.decode("latin-1").partition("?")
    headers.setdefault("host", pseudo.get(b":authority", b"").decode("latin-1"))
    head = Head(pseudo[b":method"].decode("latin-1"), target.partition("#")[0], query, headers)
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or len(length) > 15:
        raise WrongHead
    head.length = int(length) if "content-length" in headers else -1
    head.encoding = headers.get("content-encoding", "").strip().lower()
    found = _TIMEOUT.fullmatch(headers.get("grpc-timeout", ""))
    head.timeout = max(int(found[1]) * _UNITS[found[2]], 1e-9) if found else 0.0
    return head


def are_trailers(fields: list[tuple[bytes, bytes]]) -> bool:
    """Whether a request may have these trailers (RFC 9113 section 8.1); a pseudo-header field has no such name."""
    return all(_NAME.fullmatch(name) and _VALUE.fullmatch(value) for name, value in fields)
