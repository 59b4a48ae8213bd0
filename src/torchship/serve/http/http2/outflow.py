"""What a connection of HTTP/2 sends on its streams, as far as the peer's windows let it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import msgspec

from torchship.serve.http.exchange import Head, HttpFault
from torchship.serve.http.site import ConnectionLimits, Site
from torchship.wire import frames as h2
from torchship.wire.frames import ConnectionFault, StreamFault
from torchship.wire.raw import Buffer

STREAM_WINDOW = 1 << 20  # what a peer may send on one stream before we let it send more


class Stream(msgspec.Struct, eq=False):
    """One request on a connection: what came, what may still be sent, what waits to be sent.

    `window` is what we may send, `left` what the peer may send, and `taken` what of that we have not given back. Of the
    `size` of its body the site counts `held` as arriving, until the peer has `ended`. Of what is `waiting` there are
    data, place, and what ends the stream after it. `partner` is the Exchange or the Call.
    """

    number: int
    head: Head
    window: int
    left: int = STREAM_WINDOW
    taken: int = 0
    size: int = 0
    held: int = 0
    body: Buffer = b""
    ended: bool = False
    waiting: deque[tuple[bytes, int, bytes]] | None = None
    partner: Any = None
    since: float = 0.0

    def hold(self, site: Site, size: int) -> None:
        """`size` bytes of its body are here and not all is. Raises StreamFault when all bodies are too much."""
        try:
            self.held = site.hold(self.held, size)
        except HttpFault:
            raise StreamFault(self.number, h2.ENHANCE_YOUR_CALM) from None

    def late(self, now: float, limits: ConnectionLimits) -> bool:
        """Whether the peer takes too long to read, or to send the body of a request that is not gRPC."""
        waited = now - self.since
        if self.waiting is not None:
            return waited > limits.write_timeout
        return self.head.rpc is None and not self.ended and waited > limits.body_timeout


class Outflow:
    """The sending half of a connection: frames are written at once where they fit, else in turn as windows open."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._window = 65535
        self._frame = 16384
        self.initial = 65535
        self.blocked: deque[Stream] = deque()  # those that wait for a window

    def put(self, stream: Stream, head: bytes, data: bytes, tail: bytes) -> bool:
        """Send ready frames `head`, then `data` in DATA frames, then ready frames `tail`; whether all of it is sent."""
        size = len(data)
        if stream.waiting is None and size <= stream.window and size <= self._window and size <= self._frame:
            stream.window -= size
            self._window -= size
            if size:
                top = h2.TOP.pack(size >> 16, size & 0xFFFF, h2.DATA, 0, stream.number)
                self._transport.write(b"".join((head, top, data, tail)))
            else:
                self._transport.write(head + tail)
            return True
        if head:
            self._transport.write(head)
        if stream.waiting is None:
            stream.waiting = deque()
            self.blocked.append(stream)
        stream.waiting.append((data, 0, tail))
        return False

    def pump(self, now: float) -> list[Stream]:
        """Send what the windows allow, the streams in turn; those whose last frame is sent."""
        out: list[bytes] = []
        finished = []
        if len(self.blocked) > 1:
            self.blocked.rotate(-1)
        for stream in self.blocked:
            if self._advance(stream, out, now):
                finished.append(stream)
        self.blocked = deque(stream for stream in self.blocked if stream.waiting is not None)
        if out:
            self._transport.write(b"".join(out))
        return finished

    def _advance(self, stream: Stream, out: list[bytes], now: float) -> bool:
        """Send what one stream may send; whether its last frame is among it."""
        ended = False
        while stream.waiting:
            data, place, tail = stream.waiting[0]
            size = min(len(data) - place, stream.window, self._window, self._frame)
            if size > 0:
                stream.window -= size
                self._window -= size
                out.append(h2.TOP.pack(size >> 16, size & 0xFFFF, h2.DATA, 0, stream.number))
                out.append(data[place : place + size])
                place += size
                stream.since = now
            if place < len(data):
                stream.waiting[0] = data, place, tail
                if size <= 0:
                    return False
                continue
            stream.waiting.popleft()
            if tail:
                out.append(tail)
                ended = True
        stream.waiting = None
        return ended

    def forget(self, stream: Stream) -> None:
        """Nobody waits for this stream any more."""
        if stream.waiting is not None:
            stream.waiting = None
            self.blocked = deque(one for one in self.blocked if one is not stream)

    def grow(self, step: int) -> None:
        """The peer opens the connection's window. Raises ConnectionFault."""
        self._window += step
        if not step or self._window > h2.MAX_WINDOW:
            raise ConnectionFault(h2.FLOW_CONTROL_ERROR if step else h2.PROTOCOL_ERROR, "a wrong window")

    def grow_stream(self, stream: Stream, step: int) -> None:
        """The peer opens a stream's window. Raises StreamFault."""
        stream.window += step
        if not step or stream.window > h2.MAX_WINDOW:
            raise StreamFault(stream.number, h2.FLOW_CONTROL_ERROR if step else h2.PROTOCOL_ERROR)

    def change(self, key: int, value: int, streams: list[Stream]) -> None:
        """One setting of the peer. Raises ConnectionFault."""
        if key == 2 and value > 1:
            raise ConnectionFault(h2.PROTOCOL_ERROR, "ENABLE_PUSH is 0 or 1")
        if key == 4:
            if value > h2.MAX_WINDOW:
                raise ConnectionFault(h2.FLOW_CONTROL_ERROR, "the initial window is too large")
            for stream in streams:
                stream.window += value - self.initial
                if stream.window > h2.MAX_WINDOW:
                    raise ConnectionFault(h2.FLOW_CONTROL_ERROR, "a window is too large")
            self.initial = value
        if key == 5:
            if not 16384 <= value <= 2**24 - 1:
                raise ConnectionFault(h2.PROTOCOL_ERROR, "the frame size is out of range")
            self._frame = value
