"""HTTP/1.1 on a socket (RFC 9112): framing, order, limits and time-outs; what a request means is decided elsewhere.

A steady client sends the same head bytes again and again: a head is parsed and routed once and then looked up by
its bytes, so that only a body costs anything.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections import deque
from functools import partial
from typing import cast

import httptools

from torchship.errors import TorchshipError
from torchship.serve.http.coding import COMPRESS_FROM, dress, enter
from torchship.serve.http.exchange import Exchange, Head, Headers, HttpFault, header_lines, status_line
from torchship.serve.http.http2.connection import Connection2
from torchship.serve.http.site import Site, is_reset
from torchship.wire.raw import Buffer

_DIGITS = re.compile(r"[0-9]{1,15}")


class _Found:
    """What llhttp reports."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False
        self.extra = False

    def on_url(self, url: bytes) -> None:
        self.url += url
        self.extra = self.extra or self.complete

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))
        self.extra = self.extra or self.complete

    def on_headers_complete(self) -> None:
        self.complete = True

    def on_body(self, data: bytes) -> None:
        self.extra = True


def parse_head(data: bytes) -> Head:
    """Read a head that ends in an empty line. Raises HttpFault: 400 for what is not HTTP/1, 501 or 505 else."""
    found = _Found()
    parser = httptools.HttpRequestParser(found)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass  # an offer to talk something else: we go on in HTTP/1.1
    except (httptools.HttpParserError, UnicodeError) as fault:
        raise HttpFault(400, f"not HTTP/1.1: {fault}") from None
    if not found.complete or found.extra:
        raise HttpFault(400, "not one request head")
    method = parser.get_method().decode()
    version = parser.get_http_version()
    if version not in ("1.1", "1.0"):
        raise HttpFault(505, f"HTTP version {version} is not spoken here")
    try:
        url = httptools.parse_url(found.url)
        path, query = url.path.decode("ascii"), (url.query or b"").decode("ascii")
    except (httptools.HttpParserInvalidURLError, UnicodeDecodeError, AttributeError):
        raise HttpFault(400, "the request target is not a path") from None
    headers: dict[str, str] = {}
    lengths: set[str] = set()
    for raw_name, raw_value in found.headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        if name == "content-length":
            lengths.add(value)
        elif name in ("host", "transfer-encoding", "authorization") and name in headers:
            raise HttpFault(400, f"the header {name} is given twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    head = Head(method, path, query, headers)
    head.old = version == "1.0"
    _frame(head, lengths)
    # RFC 9112 section 9.3. llhttp says it only after the body; the Connection header and the version say it now.
    wish = headers.get("connection", "").lower()
    head.keep_alive = "keep-alive" in wish if head.old else "close" not in wish
    return head


def _frame(head: Head, lengths: set[str]) -> None:
    """How long the body is. Two ways to say it are one too many (RFC 9112 section 6.3)."""
    headers = head.headers
    if not head.old and "host" not in headers:  # RFC 9112 section 3.2
        raise HttpFault(400, "the header Host is missing")
    if "transfer-encoding" in headers:
        if lengths or head.old:
            raise HttpFault(400, "Transfer-Encoding beside Content-Length or in HTTP/1.0")
        if headers["transfer-encoding"].strip().lower() != "chunked":  # RFC 9112 section 6.1
            raise HttpFault(501, "only the transfer coding chunked is understood")
        head.length = -1
    elif lengths:
        # RFC 9110 section 8.6: one decimal number
        if len(lengths) > 1 or not _DIGITS.fullmatch(next(iter(lengths))):
            raise HttpFault(400, "Content-Length is not one number")
        head.length = int(lengths.pop())
    expect = headers.get("expect", "")
    if expect and expect.lower() != "100-continue":  # RFC 9110 section 10.1.1
        raise HttpFault(417, "only the expectation 100-continue is understood")
    head.expects = bool(expect) and not head.old
    head.encoding = headers.get("content-encoding", "").strip().lower()


_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[\t\x20-\x7e\x80-\xff]*)?")
_LINE_LIMIT = 1024
_TRAILER_LIMIT = 8192


class Chunks:
    """Reads one chunked body piece by piece. Source: RFC 9112 section 7.1; trailers are dropped."""

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


_STRAIGHT = 1 << 16  # bytes of a body from which on it is read into its place, where there is one
_COPY_BELOW = 1 << 13  # copying less than this is faster than a view of it
_DOUBT = 1.0  # seconds after which a peer that sends no more is asked whether it still listens
_LINGER = 2.0  # seconds that a refused peer may go on sending


class Connection(asyncio.Protocol):
    """One connection: reads requests, hands each to its endpoint, writes the answers in the order of the requests.

    Sink and Peer say what its methods do.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._buffer = b""
        self._head: Head | None = None  # set while its body arrives
        self._body: bytearray | memoryview = bytearray()
        self._held = 0  # of the body that arrives
        self._chunks: Chunks | None = None
        self._pending: deque[Exchange] = deque()
        self._closing = False
        self._again: Head | None = None  # of the last request that came in one piece
        self._top_again = b""  # its bytes
        self._size = 0  # and how many bytes such a request has
        self._greeted = False  # whether the first bytes have been looked at
        self._paused = False
        self._refused = False
        self._writable = True
        self._room = asyncio.Event()  # set when there may be room for more of a streamed answer
        self._since = site.now
        self._unsent = 0  # bytes that the transport held a second ago
        self._half_closed = 0.0  # when the peer said that it sends no more
        self.end_of_life = site.end_of_life()
        self.transport: asyncio.Transport

    # -- the socket -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A peer is there; too many of them are turned away."""
        self.transport = cast(asyncio.Transport, transport)
        if self._site.closing or len(self._site.connections) >= self._site.limits.connections:
            text = (
                b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )
            self.transport.write(text)
            # To close with a request unread is a reset, which takes the answer away with it (RFC 9112 section 9.6).
            asyncio.get_running_loop().call_later(_LINGER, self.transport.close)
            self._closing = True
            return
        secure = self.transport.get_extra_info("ssl_object")
        if secure is not None and secure.selected_alpn_protocol() == "h2":
            self._become_h2(b"")
            return
        self._site.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer is gone: nothing that it asked for is needed any more."""
        self._site.gone(self)
        self._held = self._site.hold(self._held, 0)
        self._closing = True
        self.resume_writing()
        for exchange in self._pending:
            exchange.leave()
        self._pending.clear()

    def eof_received(self) -> bool:
        """The peer sends no more (RFC 9112 section 9.6): what it has asked for in full is answered, then we close.

        It may have closed both ways, which looks the same: see `overdue`. TLS cannot be closed one way in asyncio.
        """
        if not self._pending or self.transport.get_extra_info("ssl_object") is not None:
            return False
        self._half_closed = asyncio.get_running_loop().time()
        self._closing = not self._paused  # else there may be more requests in the buffer
        return True

    def pause_writing(self) -> None:
        """The peer reads too slowly: take no more of its requests."""
        self._writable = False
        self._since, self._unsent = self._site.now, self.transport.get_write_buffer_size()
        self._hold()

    def resume_writing(self) -> None:
        """The peer has caught up."""
        self._writable = True
        self._room.set()
        self._release()

    def data_received(self, data: bytes) -> None:
        """Bytes from the peer."""
        if self._closing:
            return
        if self._greeted and not self._buffer and self._head is None and not self._paused and self._whole(data):
            return
        if self._buffer:
            self._buffer += data
        else:
            self._buffer = data
            if self._head is None:
                self._since = self._site.now
        if not self._paused:
            self._read()

    def _whole(self, data: bytes) -> bool:
        """Nearly always what comes is one whole request whose head is known, even that of the last one: begin it."""
        head = self._again
        if head is None or len(data) != self._size or not data.startswith(self._top_again):
            end = data.find(b"\r\n\r\n") + 4
            head = self._site.heads.get(data[:end])
            if head is None or head.length != len(data) - end:
                return False
            self._again, self._top_again, self._size = head, data[:end], len(data)
        end = self._size - head.length
        self._begin(head, data[end:] if head.length < _COPY_BELOW else memoryview(data)[end:])
        return True

    def _become_h2(self, early: bytes) -> None:
        """The peer speaks HTTP/2: hand the socket over."""
        self._site.connections.discard(self)
        self._closing = True
        successor = Connection2(self._site)
        self.transport.set_protocol(successor)
        successor.connection_made(self.transport)
        if early:
            successor.data_received(early)

    # -- requests -------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            place = 0
            while not self._closing and not self._paused:
                before = place
                place = self._read_body(place) if self._head is not None else self._read_head(place)
                if place == before:
                    break
            if place:
                self._buffer = self._buffer[place:]
        except TorchshipError as fault:
            self._refuse(fault)

    def _read_head(self, place: int) -> int:
        """Take one head, and its body where that is there too; the new place (the same one: more is needed)."""
        buffer, limits = self._buffer, self._site.limits
        end = buffer.find(b"\r\n\r\n", place)
        if not self._greeted and len(buffer) >= 4:
            self._greeted = True
            if buffer.startswith(b"PRI "):
                self._buffer = b""
                self._become_h2(buffer)
                return place
        if end < 0 or end - place > limits.head:
            if len(buffer) - place > limits.head:
                raise HttpFault(431, f"the request head is larger than {limits.head} bytes")
            return place
        end += 4
        head = self._head_of(buffer[place:end])
        length = head.length
        if 0 <= length <= len(buffer) - end:
            view = memoryview(buffer)[end : end + length]
            self._begin(head, bytes(view) if length < _COPY_BELOW else view)
            return end + length
        if length > limits.max_body:
            raise HttpFault(413, f"the body has {length} bytes, the limit is {limits.max_body}")
        self._head, self._since = head, self._site.now
        self._body = bytearray()
        self._chunks = Chunks(limits.max_body) if length < 0 else None
        if head.expects and end == len(buffer) and not self._pending:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if length >= _STRAIGHT and self._site.room is not None and (room := self._site.room(length)) is not None:
            have = len(buffer) - end
            room[:have] = memoryview(buffer)[end:]
            self._body, self._buffer = room, b""
            self.transport.set_protocol(BodyReader(self, room, have))
            return place
        return end

    def _head_of(self, data: bytes) -> Head:
        """The parsed and routed head, remembered by its bytes."""
        head = self._site.heads.get(data)
        if head is None:
            head = parse_head(data)
            self._site.resolve(head)
            if len(self._site.heads) >= 1024:
                self._site.heads.clear()
            if len(data) <= 2048:
                self._site.heads[data] = head
        return head

    def _read_body(self, place: int) -> int:
        head = cast(Head, self._head)
        if self._chunks is not None:
            place, done = self._chunks.feed(self._buffer, place, cast(bytearray, self._body))
        else:
            take = min(head.length - len(self._body), len(self._buffer) - place)
            cast(bytearray, self._body).extend(memoryview(self._buffer)[place : place + take])
            place += take
            done = len(self._body) >= head.length
        self._grown(head, len(self._body), done=done)
        return place

    def _grown(self, head: Head, size: int, *, done: bool) -> None:
        """So many bytes of the body are there now. Raises HttpFault when all bodies are too much."""
        self._since = self._site.now
        self._held = self._site.hold(self._held, size)
        if done:
            self._held = self._site.hold(self._held, 0)
            body, self._body, self._head, self._chunks = self._body, bytearray(), None, None
            self._begin(head, body)

    def body_read(self, size: int, *, done: bool) -> None:
        """So many bytes of the body have been read into their place."""
        if done:
            self.transport.set_protocol(self)
        try:
            self._grown(cast(Head, self._head), size, done=done)
        except HttpFault as fault:
            self._refuse(fault)

    def _begin(self, head: Head, body: Buffer) -> None:
        """A request is complete: hand it to its endpoint."""
        exchange, site = Exchange(self, head, body), self._site
        self._pending.append(exchange)
        self._since = site.now
        if not head.keep_alive or site.now > self.end_of_life:
            self._closing = True
        if len(self._pending) >= site.limits.pipelined:
            self._hold()
        enter(exchange, site)

    def _refuse(self, fault: TorchshipError) -> None:
        """What came is not HTTP that we take: say so after the answers that are due, then close."""
        exchange = Exchange(self, Head("", "", "", {}, keep_alive=False), b"")
        self._pending.append(exchange)
        self._closing = self._refused = True
        self._head, self._buffer, self._body = None, b"", bytearray()
        self.transport.set_protocol(self)
        self._held = self._site.hold(self._held, 0)
        exchange.fail(fault if isinstance(fault, HttpFault) else HttpFault(400, str(fault), hint=fault.hint))

    # -- answers --------------------------------------------------------------------------------------------------

    def send(self, exchange: Exchange, status: int, body: bytes, content_type: str, headers: Headers) -> None:
        """Write a whole answer, or keep it until those before it are written."""
        if self._site.cors is None and len(body) < COMPRESS_FROM:
            self._send(exchange, status, content_type, body, headers)
        else:
            then = partial(self._send, exchange, status, content_type)
            dress(exchange, body, headers, cors=self._site.cors, then=then)

    def _send(self, exchange: Exchange, status: int, content_type: str, body: bytes, headers: Headers) -> None:
        head, site, pending = exchange.head, self._site, self._pending
        if head.keep_alive and not head.old and not self._closing:
            top = site.tops.get((status, content_type, headers)) or site.top(status, content_type, headers)
            data = b"%b%d\r\n\r\n%b" % (top, len(body), body)
        else:
            data = self._top(exchange, status, content_type, (*headers, ("content-length", str(len(body))))) + body
        if head.method == "HEAD":
            data = data[: len(data) - len(body)]
        if pending and pending[0] is exchange:
            pending.popleft()
            self.transport.write(data)
            if pending or self._closing or self._paused:
                self._flush()
        else:
            exchange.ready = data

    def _top(
        self, exchange: Exchange, status: int, content_type: str, headers: Headers, *, ends: bool = False
    ) -> bytes:
        """The head of an answer; `ends`: the end of the connection is its end."""
        head = exchange.head
        if ends or not head.keep_alive or (self._closing and self._pending and self._pending[-1] is exchange):
            headers = (*headers, ("connection", "close"))  # RFC 9112 section 9.6
        elif head.old:
            headers = (*headers, ("connection", "keep-alive"))
        top = status_line(status) + self._site.date
        return top + header_lines((("content-type", content_type), *headers)) + b"\r\n"

    def _flush(self) -> None:
        """Write the answers whose turn it is, and close when all is said."""
        pending = self._pending
        while pending and pending[0].ready is not None:
            exchange = pending.popleft()
            self.transport.write(cast(bytes, exchange.ready))
        if pending and pending[0].started:
            return
        if not pending:
            self._since = self._site.now
            # A peer that was refused may still be sending, and would lose our answer if we closed at once.
            if self._refused and self.transport.can_write_eof():
                self.transport.write_eof()
            elif self._closing:
                self.transport.close()
        self._release()

    def begin(self, exchange: Exchange, status: int, content_type: str, headers: Headers) -> None:
        head = exchange.head
        if self._site.cors is not None:
            headers = (*headers, *self._site.cors.headers(head))
        if head.old:
            self._closing = True
        extra = () if head.old else (("transfer-encoding", "chunked"),)
        self._put(exchange, self._top(exchange, status, content_type, (*headers, *extra), ends=head.old))

    def write(self, exchange: Exchange, data: bytes) -> None:
        self._put(exchange, data if exchange.head.old else b"".join((b"%x\r\n" % len(data), data, b"\r\n")))

    def end(self, exchange: Exchange) -> None:
        self._put(exchange, b"" if exchange.head.old else b"0\r\n\r\n")
        exchange.started = False
        if self._pending and self._pending[0] is exchange:
            self._pending.popleft()
            self._flush()
        elif exchange.ready is None:
            exchange.ready = b""

    def _put(self, exchange: Exchange, data: bytes) -> None:
        if self._pending and self._pending[0] is exchange:
            if exchange.ready:
                data, exchange.ready = exchange.ready + data, None
            self.transport.write(data)
        else:
            exchange.ready = (exchange.ready or b"") + data

    async def drained(self, exchange: Exchange) -> None:
        while not self._writable:
            self._room.clear()
            await self._room.wait()

    # -- pace -----------------------------------------------------------------------------------------------------

    def _hold(self) -> None:
        if not self._paused and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def _release(self) -> None:
        if self._paused and self._writable and len(self._pending) < self._site.limits.pipelined:
            self._paused = False
            if not self.transport.is_closing():
                self.transport.resume_reading()
                asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._buffer and not self._paused and not self._closing:
            self._read()
        if self._half_closed and not self._paused:
            self._closing = True
            self._flush()

    def overdue(self, now: float) -> None:
        """Close the connection when its peer has kept us waiting for too long."""
        if not self._writable:  # what is written meanwhile makes it more again
            before, self._unsent = self._unsent, self.transport.get_write_buffer_size()
            self._since = now if self._unsent < before else self._since  # the peer reads, though slowly
        waited, limits = now - self._since, self._site.limits
        if self._half_closed:
            self._probe(now)
        if self._refused and not self._pending and waited > _LINGER:
            self.transport.abort()
        if not self._writable:
            if waited > limits.write_timeout:
                self.transport.abort()
        elif self._head is not None:
            if waited > limits.body_timeout:
                self._refuse(HttpFault(408, "the body did not arrive in time"))
        elif self._buffer and not self._paused:
            if waited > limits.head_timeout:
                self._refuse(HttpFault(408, "the request head did not arrive in time"))
        elif not self._pending and waited > limits.idle:
            self.transport.close()

    def _probe(self, now: float) -> None:
        """Ask a peer that sends no more whether it still listens: one that has closed both ways answers with a reset.

        An interim answer is one that every client of HTTP/1.1 reads over (RFC 9110 section 15.2).
        """
        if is_reset(self.transport):
            self.transport.abort()
        elif now - self._half_closed >= _DOUBT and self._pending:
            self._half_closed = math.inf  # asked once
            if not self._pending[0].started and not self._pending[0].head.old:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def retire(self) -> None:
        """The server stops: close now, or as soon as the answers that are due have been sent."""
        self._closing = True
        if not self._pending:
            self.transport.close()


class BodyReader(asyncio.BufferedProtocol):
    """Stands for a connection while a large body is read into its place without a copy."""

    def __init__(self, connection: Connection, room: memoryview, have: int) -> None:
        self._connection, self._room, self._have = connection, room, have

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room[self._have :]

    def buffer_updated(self, nbytes: int) -> None:
        self._have += nbytes
        self._connection.body_read(self._have, done=self._have == len(self._room))

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)

    def eof_received(self) -> bool:
        return self._connection.eof_received()

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()
