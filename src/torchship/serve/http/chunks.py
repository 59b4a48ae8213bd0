"""The chunked transfer coding of HTTP/1.1, strictly: an ambiguity here is how requests are smuggled."""

from __future__ import annotations

import re

from torchship.serve.http.exchange import HttpFault

_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[\t\x20-\x7e\x80-\xff]*)?")
_LINE_LIMIT = 1024
_TRAILER_LIMIT = 8192


class Chunks:
    """Reads one chunked body piece by piece. Source: RFC 9112 section 7.1; trailers are dropped."""

    __slots__ = ("_left", "_limit", "_state", "_trailers")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._left = 0
        self._state = "size"
        self._trailers = 0

    def feed(self, buffer: bytes, place: int, body: bytearray) -> tuple[int, bool]:
        """Append what is there to `body`; where reading stopped, and whether the body is complete.

        Raises HttpFault 400 for anything but the grammar, 413 above the limit.
        """
        while True:
            if self._state == "data":
                take = min(self._left, len(buffer) - place)
                body += memoryview(buffer)[place : place + take]
                place += take
                self._left -= take
                if self._left:
                    return place, False
                self._state = "end"
            if self._state == "end":
                if len(buffer) - place < 2:
                    return place, False
                if buffer[place : place + 2] != b"\r\n":
                    raise HttpFault(400, "a chunk is longer than it says")
                place += 2
                self._state = "size"
            end = buffer.find(b"\r\n", place, place + _LINE_LIMIT + 2)
            if end < 0:
                if len(buffer) - place > _LINE_LIMIT:
                    raise HttpFault(400, "a line of the chunked body is too long")
                return place, False
            line, place = buffer[place:end], end + 2
            if self._state == "trailers":
                self._trailers += len(line) + 2
                if self._trailers > _TRAILER_LIMIT:
                    raise HttpFault(431, "the trailers are too large")
                if not line:
                    return place, True
            else:
                self._size(line, len(body))

    def _size(self, line: bytes, have: int) -> None:
        found = _SIZE.fullmatch(line)
        if not found:
            raise HttpFault(400, "a chunk does not begin with its size")
        self._left = int(found[1], 16)
        if have + self._left > self._limit:
            raise HttpFault(413, f"the body is larger than {self._limit} bytes")
        self._state = "data" if self._left else "trailers"
