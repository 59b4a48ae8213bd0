"""gRPC on a stream of HTTP/2: messages in, messages and a status out."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

from torchship.serve.http.coding import INFLATE_OFF_LOOP_FROM, decompress
from torchship.serve.http.exchange import HttpFault, spawn
from torchship.serve.http.http2.outflow import Stream
from torchship.wire import frames as h2
from torchship.wire.raw import Buffer
from torchship.wire.status import status_of, text_of

_OK, _INVALID, _EXHAUSTED, _UNIMPLEMENTED = 0, 3, 8, 12
TOP = h2.status_field(200) + b"\x0f\x10\x10application/grpc"  # content-type is number 31 of the static table
_GOOD = h2.literal(b"grpc-status", b"0")
_SAFE = "".join(chr(byte) for byte in range(0x20, 0x7F) if byte != 0x25)  # in grpc-message; the rest is percent-encoded
_QUEUE = 16  # messages of a stream that are read ahead of their use


class Call:
    """One gRPC call: `reply` once, or `write` several times and `finish`; `fail` instead of either."""

    __slots__ = ("_begun", "_link", "_over", "_queue", "_waiter", "gone", "head", "job", "stream")

    def __init__(self, link: Any, stream: Stream) -> None:
        """`link` is the Connection2 that the stream belongs to, or what stands for it (its `reply`, `message`,
        `trailers`, `drained`, `give` and `site`)."""
        self._link = link
        self.stream = stream
        self.head = stream.head
        self.job: Any = None  # a future or task that is cancelled when the caller goes away
        self.gone = False
        self._begun = False
        self._over = False
        self._queue: deque[Buffer] | None = None
        self._waiter: asyncio.Future[None] | None = None

    # -- what comes -----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """A call with several messages begins: run it as a Task."""
        self._queue = deque()
        if self._admitted():
            spawn(self, self._run)

    async def _run(self) -> None:
        await self.head.rpc.stream(self)
        self.finish()

    def feed(self) -> None:
        """Take the complete messages out of the stream's body."""
        body, queue = self.stream.body, self._queue
        if queue is None:
            return
        place = 0
        try:
            while len(body) - place >= 5:
                size = int.from_bytes(body[place + 1 : place + 5], "big")
                if size > self._link.site.limits.max_body:
                    raise HttpFault(413, f"the message has {size} bytes")
                if len(body) - place - 5 < size:
                    break
                message: Buffer = bytes(memoryview(body)[place : place + 5 + size])
                queue.append(self._plain(message))
                place += 5 + size
        except HttpFault as fault:
            self.fail(fault)
            return
        rest = bytearray(memoryview(body)[place:])
        self.stream.body, self.stream.size = rest, len(rest)
        if len(queue) < _QUEUE:
            self._link.give(self.stream)
        self._wake()

    def put(self, message: Buffer) -> None:
        """One more message of the client, behind its prefix."""
        if self._queue is not None:
            self._queue.append(message)
            self._wake()

    def complete(self) -> None:
        """The client has said all: run a call of one message."""
        if self._queue is not None:
            self._wake()
            return
        body = self.stream.body
        if len(body) < 5 or int.from_bytes(body[1:5], "big") != len(body) - 5:
            self.finish(_INVALID, "the call needs exactly one message")
        else:
            self.enter(body)

    def enter(self, body: Buffer) -> None:
        """Run a call of one message, if its caller may ask; what that raises is the answer."""
        if not self._admitted():
            return
        try:
            if not body[0]:
                self.head.rpc.unary(self, body, 5)
            elif len(body) < INFLATE_OFF_LOOP_FROM:
                self.head.rpc.unary(self, self._plain(body), 5)
            else:
                spawn(self, self._unpack, body)
        except Exception as fault:
            self.fail(fault)

    async def _unpack(self, body: Buffer) -> None:
        """Decompress the one message, then run the call. Raises HttpFault."""
        message, self.job = await asyncio.to_thread(self._plain, body), None
        if not self.gone:
            self.head.rpc.unary(self, message, 5)

    def _admitted(self) -> bool:
        try:
            if self.head.rpc.stream is None and self.head.rpc.unary is None:
                self.finish(_UNIMPLEMENTED, "unknown method")
                return False
            if self._link.site.admit is not None:
                self._link.site.admit(self.head.rpc.scope, self.head.headers)
        except Exception as fault:  # a rule that cannot decide refuses
            self.fail(fault)
            return False
        return True

    def _plain(self, message: Buffer) -> Buffer:
        """A message with its prefix, unpacked where it was compressed. Raises HttpFault."""
        if not message[0]:
            return message
        coding = self.head.headers.get("grpc-encoding", "identity")
        if message[0] != 1 or coding == "identity":
            raise HttpFault(400, "the message says it is compressed, the call does not")
        return bytes(5) + decompress(memoryview(message)[5:], coding=coding, limit=self._link.site.limits.max_body)

    async def messages(self) -> AsyncIterator[Buffer]:
        """The messages of the client, each behind a prefix of five bytes, until it has said all."""
        queue = self._queue
        assert queue is not None  # noqa: S101  (only calls that stream are asked)
        while True:
            while queue:
                yield queue.popleft()
                if len(queue) < _QUEUE:
                    self._link.give(self.stream)
            if self.stream.ended or self._over:
                return
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- what goes ------------------------------------------------------------------------------------------------

    def reply(self, data: bytes, *, trace: str = "") -> None:
        """Send the one answer, and that all is well; `trace` goes into the trailers as `traceparent`."""
        if self._over or self.gone:
            return
        if trace:
            self.write(data)
            self.finish(extra=h2.literal(b"traceparent", trace.encode()))
            return
        self._over = True
        self._link.reply(self, data)

    def write(self, data: bytes) -> None:
        """Send one of several answers."""
        if self._over or self.gone:
            return
        first, self._begun = not self._begun, True
        self._link.message(self, data, first=first)

    async def drained(self) -> None:
        """Wait until the client has taken most of what was written."""
        await self._link.drained(self)

    def finish(self, code: int = _OK, message: str = "", *, extra: bytes = b"") -> None:
        """End the call with a status; `extra` are encoded trailers."""
        fields = h2.literal(b"grpc-status", str(code).encode())
        if message:
            fields += h2.literal(b"grpc-message", quote(message.encode()[:1024], safe=_SAFE).encode())
        self.end(fields + extra)

    def end(self, fields: bytes) -> None:
        """End the call with encoded trailers, its status among them."""
        if self._over or self.gone:
            return
        self._over = True
        self._link.trailers(self, fields, first=not self._begun)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """End the call with the status of an error; a negative pushback says that trying again will not help."""
        if isinstance(error, HttpFault):
            large = error.status == 413
            pushback = h2.literal(b"grpc-retry-pushback-ms", b"-1") if large else b""
            self.finish(_EXHAUSTED if large else _INVALID, str(error), extra=pushback)
            return
        wait = getattr(error, "retry_after", 0.0)
        pushback = h2.literal(b"grpc-retry-pushback-ms", b"%d" % math.ceil(wait * 1e3)) if wait else b""
        self.finish(status_of(error).grpc, text_of(error), extra=pushback)

    def leave(self) -> None:
        """The caller went away: stop what was begun for it."""
        self.gone = True
        if self.job is not None:
            self.job.cancel()
        self._wake()


def _template(flags: int, block: bytes) -> bytes:
    """The bytes of a HEADERS frame with %b where the stream's number belongs."""
    return h2.frame(h2.HEADERS, flags, 0, block)[:5].replace(b"%", b"%%") + b"%b" + block.replace(b"%", b"%%")


TOP_FRAME = _template(h2.END_HEADERS, TOP)
GOOD_FRAME = _template(h2.END_HEADERS | h2.END_STREAM, _GOOD)
