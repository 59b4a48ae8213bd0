"""What the connections of one listener share: limits, routes, a clock, and the request heads seen before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, NamedTuple, Protocol

from torchship.serve.http.exchange import Admit, Head, Headers, HttpFault, header_lines, status_line
from torchship.serve.http.router import Router
from torchship.wire.raw import Buffer


class Rpc(NamedTuple):
    """One gRPC method. `unary(call, message, start)` where the client sends one message, which begins at `start`;
    `stream(call)` as a Task where it sends several."""

    unary: Callable[[Any, Buffer, int], object] | None = None
    stream: Callable[[Any], Coroutine[Any, Any, None]] | None = None
    scope: str = ""

    @property
    def client_streams(self) -> bool:
        """Whether the client sends several messages."""
        return self.stream is not None


_NO_RPC = Rpc()


class Peer(Protocol):
    """A connection, as its listener sees it."""

    transport: asyncio.Transport

    def overdue(self, now: float) -> None:
        """Hang up when the other side has kept us waiting for too long."""
        ...

    def retire(self) -> None:
        """Hang up as soon as the answers that are due have been sent."""
        ...


@dataclass(slots=True, frozen=True)
class ConnectionLimits:
    """What one caller may use. Sizes in bytes, times in seconds."""

    body: int = 64 << 20
    bodies: int = 1 << 30  # of all bodies together that are still arriving
    head: int = 32 << 10
    connections: int = 4096
    pipelined: int = 128
    streams: int = 128
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    body_rate: float = 20_000.0  # bytes a second, on top of body_seconds
    idle_seconds: float = 75.0
    write_seconds: float = 30.0


@dataclass(slots=True)
class Site:
    """What the connections of one listener share."""

    router: Router
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    admit: Admit | None = None
    connections: set[Peer] = field(default_factory=set)
    heads: dict[bytes, Head] = field(default_factory=dict)
    now: float = 0.0
    tops: dict[tuple[int, str, Headers], bytes] = field(default_factory=dict)
    date: bytes = b""
    closing: bool = False
    held: int = 0  # bytes of bodies that are still arriving
    rpcs: Mapping[str, Rpc] = field(default_factory=dict)
    empty: asyncio.Future[None] | None = None  # set while closing: done when the last connection is gone

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
            head.rpc = self.rpcs.get(head.path, _NO_RPC)
        else:
            self.router.resolve(head)

    def tick(self, now: float) -> None:
        """Once a second: the clock and the Date header, and connections that are too slow."""
        self.now = now
        self.date = f"server: torchship\r\ndate: {formatdate(usegmt=True)}\r\n".encode()
        self.tops.clear()
        for connection in tuple(self.connections):
            connection.overdue(now)

    def top(self, status: int, content_type: str, headers: Headers) -> bytes:
        """The head of an answer up to the number of its content-length, remembered for this second."""
        found = self.tops.get((status, content_type, headers))
        if found is None:
            lines = header_lines((("content-type", content_type), *headers))
            found = status_line(status) + self.date + lines + b"content-length: "
            if len(self.tops) < 256:
                self.tops[status, content_type, headers] = found
        return found

    def gone(self, connection: Peer) -> None:
        """A connection has ended."""
        self.connections.discard(connection)
        if self.empty is not None and not self.connections and not self.empty.done():
            self.empty.set_result(None)
