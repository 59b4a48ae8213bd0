"""Bytes of a connection to frames of HTTP/2."""

from __future__ import annotations

from collections.abc import Iterator

from torchship.wire import frames as h2
from torchship.wire.frames import ConnectionFault

FRAME = 1 << 18  # the largest frame that we take


class Reader:
    """Collects what comes until a frame is complete; a large one is joined once, not once per piece."""

    __slots__ = ("_have", "_need", "_parts", "started")

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
        place = 0 if self.started else self._preface(data)
        size = len(data)
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

    def _preface(self, data: bytes) -> int:
        if not h2.PREFACE.startswith(data[: len(h2.PREFACE)]):
            raise ConnectionFault(h2.PROTOCOL_ERROR, "this port speaks HTTP/2 with prior knowledge or ALPN")
        if len(data) < len(h2.PREFACE):
            return 0
        self.started = True
        return len(h2.PREFACE)
