"""Requests of HTTP/2 that are not gRPC: to the same endpoints as those of HTTP/1.1, and their answers."""

from __future__ import annotations

from typing import Any

from torchship.serve.http.coding import COMPRESS_FROM, enter, packs
from torchship.serve.http.exchange import Exchange, Headers, HttpFault
from torchship.serve.http.http2.outflow import Stream
from torchship.serve.http.site import Site
from torchship.wire import frames as h2


class Answers:
    """The REST side of one connection of HTTP/2."""

    __slots__ = ("_link", "_site")

    def __init__(self, link: Any, site: Site) -> None:
        self._link, self._site = link, site

    def begin_exchange(self, stream: Stream, fault: HttpFault | None = None) -> None:
        """A request that is not gRPC: to its endpoint."""
        head = stream.head
        exchange = Exchange(self, head, stream.body)
        exchange.stream, stream.partner = stream, exchange
        try:
            if fault is not None:
                raise fault
            if self._site.admit is not None:
                self._site.admit(head.scope, head.headers)
            if head.encoding and stream.body:
                enter(exchange, limit=self._site.limits.body)
            else:
                head.endpoint(exchange)
        except Exception as error:
            exchange.fail(error)

    def send(self, exchange: Exchange, status: int, body: bytes, content_type: str, headers: Headers) -> None:
        """A whole answer of REST."""
        if len(body) >= COMPRESS_FROM and "accept-encoding" in exchange.head.headers:

            def then(data: bytes, told: Headers) -> None:
                self._send(exchange, status, data, content_type, (*headers, *told))

            if packs(exchange, body, then=then):
                return
        self._send(exchange, status, body, content_type, headers)

    def _send(self, exchange: Exchange, status: int, body: bytes, content_type: str, headers: Headers) -> None:
        stream: Stream = exchange.stream
        top = self._top(status, content_type, (*headers, ("content-length", str(len(body)))))
        if exchange.head.method == "HEAD" or not body:
            self._link.put(stream, b"", b"", h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, stream.number, top))
            return
        end = h2.frame(h2.DATA, h2.END_STREAM, stream.number)
        self._link.put(stream, h2.frame(h2.HEADERS, h2.END_HEADERS, stream.number, top), body, end)

    def _top(self, status: int, content_type: str, headers: Headers) -> bytes:
        fields = [h2.status_field(status), h2.literal(b"server", b"torchship")]
        for name, value in (("content-type", content_type), *headers):
            fields.append(h2.literal(name.encode(), value.encode("latin-1")))
        return b"".join(fields)

    def begin(self, exchange: Exchange, status: int, content_type: str, headers: Headers) -> None:
        """The head of a streamed answer of REST."""
        top = self._top(status, content_type, headers)
        self._link.put(exchange.stream, h2.frame(h2.HEADERS, h2.END_HEADERS, exchange.stream.number, top), b"", b"")

    def write(self, exchange: Exchange, data: bytes) -> None:
        """A piece of a streamed answer of REST."""
        self._link.put(exchange.stream, b"", data, b"")

    def end(self, exchange: Exchange) -> None:
        """The end of a streamed answer of REST."""
        self._link.put(exchange.stream, b"", b"", h2.frame(h2.DATA, h2.END_STREAM, exchange.stream.number))

    async def drained(self, exchange: Exchange) -> None:
        """Wait until the peer has taken most of what was written."""
        await self._link.drained(exchange.stream)
