"""What RFC 9113 section 6 demands of each frame by itself: its size, and whether it belongs to a stream."""

from __future__ import annotations

from torchship.wire import frames as h2
from torchship.wire.frames import ConnectionFault, StreamFault

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


class Unfinished:
    """A header block that comes in several frames; how many and how long they are is bounded."""

    __slots__ = ("_left", "_limit", "data", "flags", "number")

    def __init__(self, number: int, flags: int, data: bytes, *, limit: int) -> None:
        self.number, self.flags, self.data = number, flags, bytearray(data)
        self._limit, self._left = limit, 64

    def add(self, payload: bytes) -> None:
        """One more piece. Raises ConnectionFault."""
        self.data += payload
        self._left -= 1
        if len(self.data) > self._limit or self._left < 0:
            raise ConnectionFault(h2.ENHANCE_YOUR_CALM, "the header block is too large")


class Late:
    """Streams that we have closed while the peer may not have known: what it sends on them is no fault."""

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers: dict[int, None] = {}

    def add(self, number: int) -> None:
        """One more; the last thousand are known."""
        self._numbers[number] = None
        if len(self._numbers) > 1000:
            del self._numbers[next(iter(self._numbers))]

    def check(self, number: int) -> None:
        """Raises ConnectionFault for a frame on any other stream that is over (RFC 9113 section 5.1)."""
        if number not in self._numbers:
            raise ConnectionFault(h2.STREAM_CLOSED, "a frame after the end of its stream")
