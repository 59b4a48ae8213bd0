"""One HTTP request and the way its answer goes, whatever the version of HTTP."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any, Protocol, TypeAlias

import msgspec

from torchship.errors import Busy, TorchshipError, Unavailable
from torchship.wire.raw import Buffer
from torchship.wire.status import status_of, text_of

Headers: TypeAlias = tuple[tuple[str, str], ...]
JSON = "application/json"
REASONS = {status.value: status.phrase for status in HTTPStatus}


class HttpFault(TorchshipError):
    """A request that fails as HTTP, before it means anything: `status` says how."""

    def __init__(self, status: int, message: str, *, hint: str = "", headers: Headers = ()) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.headers = headers


class Head(msgspec.Struct, eq=False):
    """Request line and headers, parsed once and shared by byte-identical requests: never changed after that.

    `headers` have lower-case names; repeated ones are joined by a comma. `length` is -1 for a chunked body, `old` is
    HTTP/1.0. `places` are what the path's {names} stand for, `memo` is what the endpoint made of this head the first
    time; `rpc` is the gRPC method, where it is one, and `timeout` its time-out in seconds.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    length: int = 0
    keep_alive: bool = True
    old: bool = False
    expects: bool = False
    encoding: str = ""
    endpoint: Any = None
    scope: str = ""
    places: Mapping[str, str] = {}
    memo: Any = None
    timeout: float = 0.0
    rpc: Any = None


class Sink(Protocol):
    """Where answers go: a connection of HTTP/1.1, or of HTTP/2."""

    def send(self, exchange: Exchange, status: int, body: bytes, content_type: str, headers: Headers) -> None:
        """The whole answer."""

    def begin(self, exchange: Exchange, status: int, content_type: str, headers: Headers) -> None:
        """The head of an answer that is streamed."""

    def write(self, exchange: Exchange, data: bytes) -> None:
        """Some of a streamed answer."""

    def end(self, exchange: Exchange) -> None:
        """The end of a streamed answer."""

    async def drained(self, exchange: Exchange) -> None:
        """Wait until the peer has taken what was written."""


class Exchange(msgspec.Struct, eq=False):
    """A request and its answer. An endpoint calls `answer` or `fail` once, or `begin`, `write`..., `end`.

    `job` is a future, task or job that is cancelled when the caller goes away, `stream` is of HTTP/2, `ready` an answer
    that waits for those before it. A `plain` answer is never compressed: some clients announce gzip for all that they
    ask, and undo it for inference alone.
    """

    sink: Sink
    head: Head
    body: Buffer
    job: Any = None
    ready: bytes | None = None
    stream: Any = None
    started: bool = False
    plain: bool = False
    gone: bool = False

    def answer(self, body: bytes, *, status: int = 200, content_type: str = JSON, headers: Headers = ()) -> None:
        """Send the whole answer; nothing happens when the caller is gone."""
        if not self.gone:
            self.sink.send(self, status, body, content_type, headers)

    def answer_json(self, value: Any, *, status: int = 200) -> None:
        """Send `value` as JSON, never compressed."""
        self.plain = True
        self.answer(msgspec.json.encode(value), status=status)

    def fail(self, error: BaseException) -> None:
        """Send an error: `{"error": text}` with the status of the table."""
        if self.gone:
            return
        if self.started:  # the status is out already: tell inside the stream, then close it
            self.write(b'data: {"error":' + msgspec.json.encode(text_of(error)) + b"}\n\n")
            self.end()
            return
        status, code = status_of(error)
        headers: Headers = (("grpc-status", str(code)),)  # tells clients apart what shares a status of HTTP
        if isinstance(error, HttpFault):
            status, headers = error.status, error.headers
        elif isinstance(error, Busy | Unavailable) and error.retry_after:
            headers += (("retry-after", str(max(1, math.ceil(error.retry_after)))),)
        elif status == HTTPStatus.UNAUTHORIZED:
            headers += (("www-authenticate", 'Bearer realm="torchship"'),)
        self.sink.send(self, status, msgspec.json.encode({"error": text_of(error)}), JSON, headers)

    def begin(self, *, status: int = 200, content_type: str = JSON, headers: Headers = ()) -> None:
        """Send the head of a streamed answer."""
        if not self.gone:
            self.started = True
            self.sink.begin(self, status, content_type, headers)

    def write(self, data: bytes) -> None:
        """Send some of a streamed answer."""
        if not self.gone and data:
            self.sink.write(self, data)

    def end(self) -> None:
        """End a streamed answer."""
        if not self.gone:
            self.sink.end(self)

    async def drained(self) -> None:
        """Wait until the caller has taken most of what was written."""
        await self.sink.drained(self)

    def leave(self) -> None:
        """The caller went away: stop what was begun for it."""
        self.gone = True
        if self.job is not None:
            self.job.cancel()


Endpoint: TypeAlias = Callable[[Exchange], object]
Admit: TypeAlias = Callable[[str, Mapping[str, str]], None]


def spawn(partner: Any, work: Callable[..., Any], *given: Any) -> None:
    """Run `work(*given)` as the task of an Exchange or a Call; what it raises is answered by its status."""

    async def run() -> None:
        try:
            await work(*given)
        except Exception as fault:
            partner.fail(fault)

    partner.job = asyncio.ensure_future(run())


def settle(partner: Any, found: Any, reply: Callable[[Any, Any], None]) -> None:
    """`reply(partner, found)` to an Exchange or a Call; where `found` is awaitable, with what it gives, later."""

    async def later() -> None:
        reply(partner, await found)

    if inspect.isawaitable(found):
        spawn(partner, later)
    else:
        reply(partner, found)


def status_line(status: int) -> bytes:
    """The first line of an answer."""
    return f"HTTP/1.1 {status} {REASONS.get(status, '')}\r\n".encode()


def header_lines(headers: Iterable[tuple[str, str]]) -> bytes:
    """Headers as HTTP/1.1 writes them. Values come from our own code, never from a request."""
    return b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in headers)
