"""What the connections of one listener share: limits, routes, a clock, and the request heads seen before."""

from __future__ import annotations

import asyncio
import math
import random
import re
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Annotated, Any, NamedTuple, Protocol

import msgspec

from torchship.serve.http.exchange import Admit, Exchange, Head, Headers, HttpFault, header_lines, status_line
from torchship.wire.raw import Buffer


class Rpc(NamedTuple):
    """One gRPC method. `unary(call, message, start)` where the client sends one message, which begins at `start`;
    `stream(call)` as a Task where it sends several."""

    unary: Callable[[Any, Buffer, int], object] | None = None
    stream: Callable[[Any], Coroutine[Any, Any, None]] | None = None
    scope: str = ""


NO_RPC = Rpc()
_Seconds = Annotated[float, msgspec.Meta(gt=0)]
_NAMES = re.compile(r"[A-Za-z0-9\-_, ]{0,1024}")


class Peer(Protocol):
    """A connection, as its listener sees it."""

    transport: asyncio.Transport
    end_of_life: float  # the time after which it goes on, but lets the peer open a new one for what comes next

    def overdue(self, now: float) -> None:
        """Hang up when the other side has kept us waiting for too long."""

    def retire(self) -> None:
        """Hang up as soon as the answers that are due have been sent."""


class CallerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one caller may use, and how long it may take: keys of `[http]` too (serve.config extends it).

    Sizes in bytes, times in seconds without progress: who is slow but goes on is never cut. `max_connection_age` is how
    long a connection may live (0: for ever), give or take a tenth, so that they do not all end at once.
    """

    max_body: Annotated[int, msgspec.Meta(ge=1)] = 64 << 20
    idle: _Seconds = 75.0
    head_timeout: _Seconds = 10.0
    body_timeout: _Seconds = 30.0
    write_timeout: _Seconds = 30.0
    max_connection_age: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class ConnectionLimits(CallerLimits, frozen=True, kw_only=True):
    """The same with what a server finds out, or nobody needs to change."""

    bodies: int = 1 << 30  # of all bodies together that are still arriving
    head: int = 32 << 10
    connections: int = 4096
    pipelined: int = 128
    streams: int = 128


class Cors:
    """Which pages of other origins may ask (Fetch standard, CORS protocol): `*`, or origins as `https://a.org:8443`."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origin.rstrip("/").lower() for origin in origins)

    def _allows(self, head: Head) -> str:
        origin = head.headers.get("origin", "")
        if not origin or "*" in self._origins:
            return "*"
        return origin if origin.lower() in self._origins else ""

    def headers(self, head: Head) -> Headers:
        """What an answer to this request says beside its own headers."""
        allowed = self._allows(head)
        vary = () if allowed == "*" else (("vary", "origin"),)
        return (
            (("access-control-allow-origin", allowed), ("access-control-expose-headers", "*")) if allowed else ()
        ) + vary

    def preflight(self, exchange: Exchange) -> None:
        """Tell a browser what it may send. Raises HttpFault 403 for a stranger."""
        wanted = exchange.head.headers.get("access-control-request-headers", "")
        if not self._allows(exchange.head) or not _NAMES.fullmatch(wanted):
            raise HttpFault(403, "this origin may not ask", hint="cors_origins in [http] names those that may")
        allow: Headers = (
            ("access-control-allow-methods", "GET, POST, PUT, DELETE"),
            *((("access-control-allow-headers", wanted),) if wanted else ()),
            ("access-control-max-age", "600"),
        )
        exchange.answer(b"", content_type="text/plain", headers=allow)


@dataclass(slots=True)
class Site:
    """What the connections of one listener share."""

    find: Callable[[Head], None]  # gives a head its endpoint: the `resolve` of a Router
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    admit: Admit | None = None
    connections: set[Peer] = field(default_factory=set)
    heads: dict[bytes, Head] = field(default_factory=dict)
    now: float = 0.0
    tops: dict[tuple[int, str, Headers], bytes] = field(default_factory=dict)
    date: bytes = b""
    closing: bool = False
    draining: bool = False
    held: int = 0  # bytes of bodies that are still arriving
    rpcs: Mapping[str, Rpc] = field(default_factory=dict)
    cors: Cors | None = None
    empty: asyncio.Future[None] | None = None  # set while closing: done when the last connection is gone
    room: Callable[[int], memoryview | None] | None = None  # where a large body may be read to, if anywhere
    on_gone: Callable[[], None] | None = None  # called after each connection

    def hold(self, before: int, after: int) -> int:
        """A body that is still arriving has grown, or is complete (0). Raises HttpFault when all are too much."""
        self.held += after - before
        if after > before and self.held > self.limits.bodies:
            self.held -= after - before
            raise HttpFault(503, "too many large bodies arrive at once", headers=(("retry-after", "1"),))
        return after

    def route(self, head: Head) -> None:
        """Give the head of a request over HTTP/2 its gRPC method, or its endpoint."""
        kind = head.headers.get("content-type", "")
        if kind.startswith("application/grpc") and head.method == "POST":
            head.rpc = self.rpcs.get(head.path, NO_RPC)
        else:
            self.resolve(head)

    def resolve(self, head: Head) -> None:
        """Give the head of a request its endpoint; where a browser asks if it may ask, that is the answer to that."""
        asks = head.method == "OPTIONS" and "access-control-request-method" in head.headers
        if self.cors is not None and asks:
            head.endpoint = self.cors.preflight
        else:
            self.find(head)

    def end_of_life(self) -> float:
        """When a connection that begins now should be replaced by a new one."""
        if self.draining:
            return 0.0
        age = self.limits.max_connection_age
        return self.now + age * random.uniform(0.9, 1.1) if age else math.inf  # noqa: S311  # no secret

    def tick(self, now: float) -> None:
        """Once a second: the clock and the Date header, and connections that are too slow."""
        self.now = now
        self.date = f"server: torchship\r\ndate: {formatdate(usegmt=True)}\r\n".encode()
        self.tops.clear()
        for connection in tuple(self.connections):
            connection.overdue(now)

    def top(self, status: int, content_type: str, headers: Headers) -> bytes:
        """The head of an answer up to the number of its content-length, remembered for this second."""
        lines = header_lines((("content-type", content_type), *headers))
        found = status_line(status) + self.date + lines + b"content-length: "
        if len(self.tops) < 256:
            self.tops[status, content_type, headers] = found
        return found

    def drain(self) -> None:
        """Let callers come back by new connections."""
        self.draining = True
        for connection in tuple(self.connections):
            connection.end_of_life = 0.0

    async def close(self, *, grace: float) -> None:
        """Take no more connections, answer what is due for at most `grace` seconds, then hang up."""
        self.closing = True
        for connection in tuple(self.connections):
            connection.retire()
        if self.connections:
            self.empty = asyncio.get_running_loop().create_future()
            await asyncio.wait([self.empty], timeout=grace)
        for connection in tuple(self.connections):
            connection.transport.abort()

    def gone(self, connection: Peer) -> None:
        """A connection has ended."""
        self.connections.discard(connection)
        if self.on_gone is not None:
            self.on_gone()
        if self.empty is not None and not self.connections and not self.empty.done():
            self.empty.set_result(None)


def is_reset(transport: asyncio.Transport) -> bool:
    """Whether the peer has answered with a reset: nobody tells us, once it has said that it sends no more."""
    link = transport.get_extra_info("socket")
    return link is not None and link.fileno() >= 0 and link.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
