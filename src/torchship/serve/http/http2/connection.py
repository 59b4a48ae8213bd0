"""HTTP/2 on a socket (RFC 9113): frames, flow control and limits; streams become exchanges (REST) or calls (gRPC)."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from typing import cast

from torchship.serve.http.coding import COMPRESS_FROM, dress, enter
from torchship.serve.http.exchange import Exchange, Headers, HttpFault
from torchship.serve.http.http2 import framing
from torchship.serve.http.http2.calls import GOOD_FRAME, TOP, TOP_FRAME, Call
from torchship.serve.http.http2.outflow import STREAM_WINDOW, Outflow, Stream
from torchship.serve.http.site import Site, is_reset
from torchship.wire import frames as h2
from torchship.wire.frames import ConnectionFault, StreamFault

_WINDOW = 1 << 24
_AHEAD = 16  # pieces of a streamed answer that may wait for a window
_LINGER = 2.0  # seconds that a peer with a fault may go on sending


class Connection2(asyncio.Protocol):
    """One connection of HTTP/2. Sink and Peer say what its methods do."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._reader = framing.Reader()
        self._fields = framing.Fields(limit=site.limits.head)
        self._streams: dict[int, Stream] = {}
        self._late: deque[int] = deque(maxlen=1000)  # streams that we closed: what the peer still sends is no fault
        self._last = 0
        self._block: framing.Unfinished | None = None  # a header block of which CONTINUATION is still to come
        self._left = _WINDOW
        self._taken = 0
        self._pace = framing.Pace()
        self._closing = False
        self._retiring = False
        self._half_closed = False
        self._writable = True
        self._since = site.now
        self._unsent = 0  # bytes that the transport held a second ago
        self.end_of_life = site.end_of_life()
        self._room = asyncio.Event()  # set when there may be room for more of a streamed answer
        self._out: Outflow
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A peer is there; too many of them are turned away."""
        self.transport = cast(asyncio.Transport, transport)
        self._out = Outflow(self.transport)
        if self.site.closing or len(self.site.connections) >= self.site.limits.connections:
            self.transport.write(h2.settings(()) + h2.goaway(0, h2.ENHANCE_YOUR_CALM, "too many connections"))
            self.transport.close()
            self._closing = True
            return
        self.site.connections.add(self)
        pairs = ((3, self.site.limits.streams), (4, STREAM_WINDOW), (5, framing.FRAME), (6, self.site.limits.head))
        self.transport.write(h2.settings(pairs) + h2.window_update(0, _WINDOW - 65535))

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer is gone, and all that it asked for with it."""
        self.site.gone(self)
        self._closing = True
        self.resume_writing()
        for stream in tuple(self._streams.values()):
            self._drop(stream)

    def eof_received(self) -> bool:
        """The peer sends no more: its streams that are complete are answered, then we close."""
        if not self._streams or self.transport.get_extra_info("ssl_object") is not None:
            return False
        for stream in tuple(self._streams.values()):
            if not stream.ended:
                self._drop(stream)
        self.retire()
        self._half_closed = True
        self.transport.write(h2.frame(h2.PING, 0, 0, bytes(8)))  # a peer that has closed both ways answers with a reset
        return not self._closing

    def pause_writing(self) -> None:
        """The peer reads too slowly: read no more from it."""
        self._writable = False
        self._since, self._unsent = self.site.now, self.transport.get_write_buffer_size()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """The peer has caught up."""
        self._writable = True
        self._room.set()
        if not self._closing and not self.transport.is_closing():
            self.transport.resume_reading()

    async def drained(self, partner: Exchange | Call) -> None:
        """Wait until the peer has taken most of what was written, and its windows let some of the rest through."""
        stream: Stream = partner.stream
        while not self._writable or (stream.waiting is not None and len(stream.waiting) > _AHEAD):
            self._room.clear()
            await self._room.wait()

    def data_received(self, data: bytes) -> None:
        """Bytes from the peer."""
        try:
            for kind, flags, number, buffer, start, end in self._reader.frames(data):
                if self._closing:
                    return
                try:
                    self._frame(kind, flags, number, buffer, start, end)
                except StreamFault as fault:
                    self._reset(fault.stream, fault.code)
        except ConnectionFault as fault:
            self._hang_up(fault.code, fault.reason)

    def _frame(self, kind: int, flags: int, number: int, data: bytes, start: int, end: int) -> None:  # noqa: PLR0917
        if self._block is not None and kind != h2.CONTINUATION:
            raise ConnectionFault(h2.PROTOCOL_ERROR, "a header block was interrupted")
        if kind == h2.DATA:
            self._on_data(flags, number, data, start, end)
        elif kind == h2.HEADERS:
            self._on_headers(flags, number, data, start, end)
        elif kind in _CONTROL:
            framing.check(kind, flags, number, data[start:end])
            self._pace.count(kind, self.site.now)
            _CONTROL[kind](self, flags, number, data[start:end])

    def _on_headers(self, flags: int, number: int, data: bytes, start: int, end: int) -> None:
        block = framing.header_block(flags, number, data, start, end)
        if flags & h2.END_HEADERS:
            self._head(number, flags, block)
        else:
            self._block = framing.Unfinished(number, flags, block, self.site.limits.head)

    def _on_continuation(self, flags: int, number: int, payload: bytes) -> None:
        if self._block is None or self._block.number != number:
            raise ConnectionFault(h2.PROTOCOL_ERROR, "CONTINUATION of nothing")
        self._block.add(payload)
        if flags & h2.END_HEADERS:
            block, self._block = self._block, None
            self._head(number, block.flags, block.data)

    def _head(self, number: int, flags: int, block: bytes) -> None:
        """A complete header block: a new stream, or trailers."""
        ended = bool(flags & h2.END_STREAM)
        if number <= self._last:  # RFC 9113 section 5.1.1: new streams have growing numbers
            self._trailers(number, ended, block)
            return
        head = self._fields.known.get(block)
        if head is None:
            fields = self._fields.decode(block)
            try:
                head = framing.head_of(fields)
            except framing.WrongHead:
                self._fields.remember(block)
                self._last = number
                raise StreamFault(number, h2.PROTOCOL_ERROR) from None
            self.site.route(head)
            self._fields.remember(block, head)
        self._last = number
        if self._retiring or len(self._streams) >= self.site.limits.streams:
            self._pace.count(h2.HEADERS, self.site.now)
            raise StreamFault(number, h2.REFUSED_STREAM)
        stream = Stream(number, head, self._out.initial)
        self._streams[number] = stream
        stream.since = self._since = self.site.now
        if head.rpc is not None:
            stream.partner = Call(self, stream)
            if head.rpc.stream is not None:
                stream.partner.open()
        elif head.length > self.site.limits.max_body:
            self._begin_exchange(stream, HttpFault(413, f"the body has {head.length} bytes"))
            return
        if ended:
            self._ended(stream)

    def _check_late(self, number: int) -> None:
        """Raises ConnectionFault for a frame on any other stream that is over (RFC 9113 section 5.1)."""
        if number not in self._late:
            raise ConnectionFault(h2.STREAM_CLOSED, "a frame after the end of its stream")

    def _trailers(self, number: int, ended: bool, block: bytes) -> None:
        fields = self._fields.decode(block)
        self._fields.remember(block)
        stream = self._streams.get(number)
        if stream is None:
            self._check_late(number)
            self._pace.count(h2.RST_STREAM, self.site.now)
            return
        if stream.ended:
            raise StreamFault(number, h2.STREAM_CLOSED)
        if not ended or not framing.are_trailers(fields):
            raise StreamFault(number, h2.PROTOCOL_ERROR)
        self._ended(stream)

    def _on_data(self, flags: int, number: int, data: bytes, start: int, end: int) -> None:
        size = end - start
        if flags & h2.PADDED:
            start, end = framing.unpad(data, start, end)
        stream = self._flow(number, size)
        if stream is None:
            return
        ended = flags & h2.END_STREAM
        if start == end and not ended:
            self._pace.count(h2.DATA, self.site.now)  # data that says nothing
        if not stream.size and ended:
            stream.body = data[start:end]
        elif start < end:
            if not stream.size:
                stream.body = bytearray()
            cast(bytearray, stream.body).extend(memoryview(data)[start:end])
        stream.size += end - start
        if not ended:
            stream.hold(self.site, stream.size)
        if stream.size > self.site.limits.max_body + 5:
            self._too_large(stream)
            return
        if stream.partner is not None and stream.head.rpc is not None and stream.head.rpc.stream is not None:
            stream.partner.feed()
        elif not ended:
            self.give(stream)
        if ended:
            self._ended(stream)

    def _too_large(self, stream: Stream) -> None:
        fault = HttpFault(413, f"there are more than {self.site.limits.max_body} bytes")
        if stream.head.rpc is not None:
            stream.partner.fail(fault)
        else:
            self._begin_exchange(stream, fault)

    def _flow(self, number: int, size: int) -> Stream | None:
        """Count data against both windows; its stream, or None where we have closed that already."""
        self._left -= size
        self._taken += size
        if self._left < 0:  # RFC 9113 section 6.9.1
            raise ConnectionFault(h2.FLOW_CONTROL_ERROR, "more data than the window allows")
        if self._taken > _WINDOW // 2:
            self.transport.write(h2.window_update(0, self._taken))
            self._left += self._taken
            self._taken = 0
        stream = self._streams.get(number)
        if stream is None:
            if number > self._last or not number:
                raise ConnectionFault(h2.PROTOCOL_ERROR, "DATA before HEADERS")
            self._check_late(number)
            self._pace.count(h2.DATA, self.site.now)
            return None
        if stream.ended:
            raise StreamFault(number, h2.STREAM_CLOSED)
        stream.left -= size
        stream.taken += size
        stream.since = self.site.now
        if stream.left < 0:
            raise StreamFault(number, h2.FLOW_CONTROL_ERROR)
        return stream

    def give(self, stream: Stream) -> None:
        """Let the peer send as much as it has sent, once that is worth a frame."""
        if stream.taken > STREAM_WINDOW // 2 and not stream.ended:
            self.transport.write(h2.window_update(stream.number, stream.taken))
            stream.left += stream.taken
            stream.taken = 0

    def _ended(self, stream: Stream) -> None:
        """The peer has said all."""
        stream.ended = True
        if stream.held:
            stream.hold(self.site, 0)
        head = stream.head
        if head.length >= 0 and head.length != stream.size:  # RFC 9113 section 8.1.1
            raise StreamFault(stream.number, h2.PROTOCOL_ERROR)
        if head.rpc is not None and stream.partner is not None:
            stream.partner.complete()
        elif stream.number in self._streams and stream.partner is None:
            self._begin_exchange(stream)

    def _on_window(self, flags: int, number: int, payload: bytes) -> None:
        step = h2.WORD.unpack(payload)[0] & 0x7FFFFFFF
        if not number:
            self._out.grow(step)
        else:
            stream = self._streams.get(number)
            if stream is None:
                if number > self._last:
                    raise ConnectionFault(h2.PROTOCOL_ERROR, "WINDOW_UPDATE before HEADERS")
                return
            self._out.grow_stream(stream, step)
        if self._out.blocked:
            self._pump()

    def _on_settings(self, flags: int, number: int, payload: bytes) -> None:
        if flags & h2.ACK:
            return
        for place in range(0, len(payload), 6):
            key = int.from_bytes(payload[place : place + 2], "big")
            self._out.change(key, h2.WORD.unpack_from(payload, place + 2)[0], [*self._streams.values()])
        self.transport.write(h2.frame(h2.SETTINGS, h2.ACK, 0))
        if self._out.blocked:
            self._pump()

    def _on_ping(self, flags: int, number: int, payload: bytes) -> None:
        if not flags & h2.ACK:
            self.transport.write(h2.frame(h2.PING, h2.ACK, 0, payload))

    def _on_reset(self, flags: int, number: int, payload: bytes) -> None:
        if number > self._last:
            raise ConnectionFault(h2.PROTOCOL_ERROR, "RST_STREAM of an idle stream")
        if (stream := self._streams.get(number)) is not None:
            self._drop(stream)

    def _begin_exchange(self, stream: Stream, fault: HttpFault | None = None) -> None:
        """A request that is not gRPC: to its endpoint."""
        exchange = Exchange(self, stream.head, stream.body)
        exchange.stream, stream.partner = stream, exchange
        if fault is not None:
            exchange.fail(fault)
        else:
            enter(exchange, self.site)

    def send(self, exchange: Exchange, status: int, body: bytes, content_type: str, headers: Headers) -> None:
        if self.site.cors is None and len(body) < COMPRESS_FROM:
            self._send(exchange, status, content_type, body, headers)
        else:
            then = partial(self._send, exchange, status, content_type)
            dress(exchange, body, headers, cors=self.site.cors, then=then)

    def _send(self, exchange: Exchange, status: int, content_type: str, body: bytes, headers: Headers) -> None:
        stream: Stream = exchange.stream
        top = self._top(status, content_type, (*headers, ("content-length", str(len(body)))))
        if exchange.head.method == "HEAD" or not body:
            self.put(stream, b"", b"", h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, stream.number, top))
            return
        end = h2.frame(h2.DATA, h2.END_STREAM, stream.number)
        self.put(stream, h2.frame(h2.HEADERS, h2.END_HEADERS, stream.number, top), body, end)

    def _top(self, status: int, content_type: str, headers: Headers) -> bytes:
        fields = [h2.status_field(status), h2.literal(b"server", b"torchship")]
        for name, value in (("content-type", content_type), *headers):
            fields.append(h2.literal(name.encode(), value.encode("latin-1")))
        return b"".join(fields)

    def begin(self, exchange: Exchange, status: int, content_type: str, headers: Headers) -> None:
        if self.site.cors is not None:
            headers = (*headers, *self.site.cors.headers(exchange.head))
        top = self._top(status, content_type, headers)
        self.put(exchange.stream, h2.frame(h2.HEADERS, h2.END_HEADERS, exchange.stream.number, top), b"", b"")

    def write(self, exchange: Exchange, data: bytes) -> None:
        self.put(exchange.stream, b"", data, b"")

    def end(self, exchange: Exchange) -> None:
        self.put(exchange.stream, b"", b"", h2.frame(h2.DATA, h2.END_STREAM, exchange.stream.number))

    def reply(self, call: Call, data: bytes) -> None:
        """The only answer of a gRPC call, and that all is well."""
        number = call.stream.number.to_bytes(4, "big")
        message = b"".join((b"\0", len(data).to_bytes(4, "big"), data))
        self.put(call.stream, TOP_FRAME % number, message, GOOD_FRAME % number)

    def message(self, call: Call, data: bytes, *, first: bool) -> None:
        """One of several answers of a gRPC call."""
        top = TOP_FRAME % call.stream.number.to_bytes(4, "big") if first else b""
        self.put(call.stream, top, b"".join((b"\0", len(data).to_bytes(4, "big"), data)), b"")

    def trailers(self, call: Call, fields: bytes, *, first: bool) -> None:
        """The encoded status of a gRPC call, which ends it; `first`: there was no answer."""
        block = TOP + fields if first else fields
        end = h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, call.stream.number, block)
        self.put(call.stream, b"", b"", end)

    def put(self, stream: Stream, head: bytes, data: bytes, tail: bytes) -> None:
        """Send ready header frames `head`, then `data` in DATA frames, then the ready frames `tail`.

        `tail` ends the stream where it is not empty. What the windows do not let through waits.
        """
        if self._closing or stream.number not in self._streams:
            return
        if not self._out.put(stream, head, data, tail):
            stream.since = self.site.now
            self._pump()
        elif tail:
            self._finished(stream)

    def _pump(self) -> None:
        for stream in self._out.pump(self.site.now):
            self._finished(stream)
        self._room.set()

    def _finished(self, stream: Stream) -> None:
        """All is sent: the stream is closed, whatever the peer still wanted to say."""
        if not stream.ended:
            self._late.append(stream.number)
            self.transport.write(h2.reset(stream.number, h2.NO_ERROR))
            stream.hold(self.site, 0)
        self._streams.pop(stream.number, None)
        stream.partner = None  # it knows the stream: no circles for the garbage collector
        self._since = self.site.now
        if self._retiring and not self._streams:
            self._hang_up(h2.NO_ERROR, "")

    def _reset(self, number: int, code: int) -> None:
        if (stream := self._streams.get(number)) is not None:
            self._drop(stream)
        self._late.append(number)
        self._pace.count(h2.RST_STREAM, self.site.now)
        self.transport.write(h2.reset(number, code))

    def _drop(self, stream: Stream) -> None:
        """Nobody waits for this stream any more."""
        self._streams.pop(stream.number, None)
        stream.hold(self.site, 0)
        self._out.forget(stream)
        if stream.partner is not None:
            stream.partner.leave()
            stream.partner = None
        if self._retiring and not self._streams and not self._closing:
            self._hang_up(h2.NO_ERROR, "")

    def _hang_up(self, code: int, reason: str) -> None:
        if not self._closing:
            self._closing = True
            self.transport.write(h2.goaway(self._last, code, reason))
            self._since = self.site.now
            if code and self.transport.can_write_eof():
                self.transport.write_eof()  # it may still be sending, and would lose our reason if we closed at once
            else:
                self.transport.close()
            for stream in tuple(self._streams.values()):
                self._drop(stream)

    def overdue(self, now: float) -> None:
        """Hang up, or give up a stream, where the peer has kept us waiting for too long."""
        limits = self.site.limits
        if not self._writable:  # what is written meanwhile makes it more again
            before, self._unsent = self._unsent, self.transport.get_write_buffer_size()
            self._since = now if self._unsent < before else self._since  # the peer reads, though slowly
        if self._half_closed and is_reset(self.transport):
            self.transport.abort()
        if now > self.end_of_life and not self._retiring:
            self.retire()
        if self._closing and now - self._since > _LINGER:
            self.transport.abort()
        if not self._writable and now - self._since > limits.write_timeout:
            self.transport.abort()
            return
        for stream in tuple(self._streams.values()):
            if stream.late(now, limits):
                self._reset(stream.number, h2.CANCEL)
        if not self._reader.started and now - self._since > limits.head_timeout:
            self.transport.abort()
        elif self._block is not None and now - self._since > limits.head_timeout:
            self._hang_up(h2.ENHANCE_YOUR_CALM, "the header block did not arrive in time")
        elif not self._streams and now - self._since > max(limits.idle, 0.0) * 4:
            self._hang_up(h2.NO_ERROR, "idle")

    def retire(self) -> None:
        """Take no new streams (RFC 9113 section 6.8); hang up when the last one is answered."""
        if self._closing:
            self.transport.close()
        elif not self._streams:
            self._hang_up(h2.NO_ERROR, "")
        elif not self._retiring:
            self.transport.write(h2.goaway(self._last, h2.NO_ERROR))
        self._retiring = True


_CONTROL = {
    h2.PRIORITY: lambda link, flags, number, payload: None,  # read for its faults only: no stream is more urgent
    h2.RST_STREAM: Connection2._on_reset,
    h2.SETTINGS: Connection2._on_settings,
    h2.PUSH_PROMISE: lambda link, flags, number, payload: None,
    h2.PING: Connection2._on_ping,
    h2.GOAWAY: lambda link, flags, number, payload: link.retire(),
    h2.WINDOW_UPDATE: Connection2._on_window,
    h2.CONTINUATION: Connection2._on_continuation,
}
