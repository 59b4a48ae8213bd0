"""The host's side of its receivers: deals connections out to them, runs the endpoints, and replaces who dies.

The host alone binds ports and accepts, so that callers are spread evenly and none is lost but those of a receiver that
ends. What a receiver hands over are exchanges and calls like any other, with a RemoteSink for their answers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
import weakref
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
import numpy as np

from torchship import process
from torchship.errors import Unavailable
from torchship.serve.http import handover
from torchship.serve.http.coding import enter
from torchship.serve.http.exchange import Exchange, Head, Headers
from torchship.serve.http.handover import AHEAD, HEADS, BodySpan, ReceiverSite
from torchship.serve.http.http2.calls import Call
from torchship.serve.http.http2.outflow import Stream
from torchship.serve.http.site import NO_RPC, Site
from torchship.serve.ipc.channel import Channel
from torchship.serve.ipc.memory import MemoryRegion
from torchship.serve.ipc.output import WorkerOutput
from torchship.wire.raw import Buffer

_log = logging.getLogger("torchship.serve")
_MEMORY = 128 << 20  # bytes for the bodies of each receiver; what has no room there comes in memory of its own
_SILENCE = 15.0  # seconds after which a receiver is taken for hung
_BEAT = 1.0
_COPY_BELOW = 1 << 13  # copying less than this is faster than a view of it
_AT_ONCE = 64  # connections that are accepted in one turn


class RemoteSink:
    """Where the answers to the callers of one site at one receiver go. Sink says what its methods do, and Connection2
    those for calls."""

    def __init__(self, site: Site, channel: Channel, opened: dict[int, Exchange | Call], room: asyncio.Event) -> None:
        """`room` is set whenever some of a streamed answer has been taken."""
        self.site = site
        self._post, self._open, self._room = channel.post, opened, room

    def send(self, exchange: Exchange, status: int, body: bytes, content_type: str, headers: Headers) -> None:
        number = exchange.stream.number
        if self._open.pop(number, None) is not None:
            self._post(handover.Answered(number, body, status, content_type, headers, exchange.plain))

    def begin(self, exchange: Exchange, status: int, content_type: str, headers: Headers) -> None:
        self._post(handover.Began(exchange.stream.number, status, content_type, headers))

    def write(self, exchange: Exchange | Call, data: bytes) -> None:
        exchange.stream.window -= 1
        self._post(handover.Wrote(exchange.stream.number, data))

    def end(self, exchange: Exchange) -> None:
        if self._open.pop(exchange.stream.number, None) is not None:
            self._post(handover.Ended(exchange.stream.number))

    async def drained(self, partner: Exchange | Call) -> None:
        while partner.stream.window <= 0 and not partner.gone:
            self._room.clear()
            await self._room.wait()

    def reply(self, call: Call, data: bytes) -> None:
        if self._open.pop(call.stream.number, None) is not None:
            self._post(handover.Answered(call.stream.number, data))

    def message(self, call: Call, data: bytes, *, first: bool) -> None:
        self.write(call, data)

    def trailers(self, call: Call, fields: bytes, *, first: bool) -> None:
        if self._open.pop(call.stream.number, None) is not None:
            self._post(handover.Ended(call.stream.number, fields))

    def give(self, stream: Stream) -> None:
        """One more message of a call has been taken."""
        self._post(handover.MessageTaken(stream.number))


class ReceiverProcess:
    """One receiver: a child, its memory, and what it has handed over and not been answered."""

    def __init__(self, pool: ReceiverPool, region: MemoryRegion) -> None:
        """Starts the process, for whose bodies `region` is. Raises Unavailable when descriptors have run out."""
        self._pool, self._loop = pool, asyncio.get_running_loop()
        self._open: dict[int, Exchange | Call] = {}
        self._heads: list[tuple[Head, RemoteSink] | None] = [None] * HEADS
        self._lent: dict[int, weakref.ref[Any]] = {}
        self._freed: list[int] = []
        self._sinks: list[RemoteSink] = []
        self._room = asyncio.Event()
        self.connections = 0
        self.ready = False
        self.heard = time.monotonic()
        self.closed: set[int] = set()  # the sites that have no connections any more
        self._reason = ""
        self._region = region
        output = WorkerOutput(loop=self._loop, on_line=self._on_line)
        try:
            self._child, sock = process.converse(
                "torchship.serve.http.receiver:main",
                argument=(self._region.fd, pool.files),
                fds=(self._region.fd,),
                output=output.inlet,
                threads=1,
            )
            self._pidfd = os.pidfd_open(self._child.pid)
        except OSError as fault:
            self._region.close()
            output.close()
            raise Unavailable(f"cannot start a receiver: {fault}") from None
        finally:
            os.close(output.inlet)
        self._output, self.pid = output, self._child.pid
        self._region.drop_descriptor()
        self._channel = Channel(sock, decode=handover.decode_from_receiver, on_event=self._on_event, on_end=self.kill)
        self._loop.add_reader(self._pidfd, self._end)
        for site, about in pool.sites:
            self.serve(site, about)

    def _on_line(self, line: str) -> None:
        _log.info("%s", line, extra={"station": "receiver", "pid": self.pid})

    # -- what it is told --------------------------------------------------------------------------------------------

    def serve(self, site: Site, about: ReceiverSite) -> None:
        """One more site."""
        self._sinks.append(RemoteSink(site, self._channel, self._open, self._room))
        self._channel.post(handover.Serve(about))

    def connect(self, index: int, sock: socket.socket) -> None:
        """Hand a connection over."""
        self.connections += 1
        self._channel.post(handover.Connect(index), sock.detach())

    def retire(self, index: int, grace: float | None = None) -> None:
        """Let the callers of a site come back by new connections; with `grace`, hang up after so many seconds."""
        self._channel.post(handover.Retire(index, grace))

    def beat(self, now: float) -> None:
        """Once a second: tell what is free, and end it where it gives no sign of life."""
        self._free()
        if now - self.heard > _SILENCE:
            self.kill(f"gave no sign of life for {_SILENCE:g} s")

    def kill(self, reason: str) -> None:
        """End it now."""
        self._reason = self._reason or reason
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    # -- what it tells ----------------------------------------------------------------------------------------------

    def _on_event(self, event: Any, fd: int) -> None:
        match event:
            case handover.NewRequest():
                self._asked(event, self._body(event.body, fd))
                if self._freed:
                    self._free()
            case handover.NewHead():
                self._new_head(event)
            case handover.Left() if (partner := self._open.pop(event.number, None)) is not None:
                partner.leave()
            case handover.Said():
                self._said(self._open.get(event.number), None if event.body is None else self._body(event.body, fd))
            case handover.MessageTaken() if (partner := self._open.get(event.number)) is not None:
                partner.stream.window += 1
                self._room.set()
            case handover.HungUp() if event.site < 0:
                self.connections -= 1
            case handover.HungUp():
                self.closed.add(event.site)
                self._pool.changed.set()
            case handover.Beat():
                self.heard = time.monotonic()
                if not self.ready:
                    self.ready = True
                    self._pool.changed.set()

    def _new_head(self, event: handover.NewHead) -> None:
        head = Head(event.method, event.path, event.query, event.headers, timeout=event.timeout)
        sink = self._sinks[event.site]
        if event.call:
            head.rpc = sink.site.rpcs.get(event.path, NO_RPC)
        else:
            sink.site.resolve(head)
        self._heads[event.number % HEADS] = head, sink

    def _asked(self, event: handover.NewRequest, body: Buffer) -> None:
        """A request is complete, or a call begins: hand it to its endpoint."""
        if (known := self._heads[event.head % HEADS]) is None:
            raise ValueError(f"head {event.head} was never told")
        head, sink = known
        stream = Stream(event.number, head, AHEAD)
        if head.rpc is None:
            exchange = self._open[event.number] = Exchange(sink, head, body, stream=stream)
            enter(exchange, sink.site)
            return
        call = self._open[event.number] = Call(sink, stream)
        if head.rpc.stream is not None:
            call.open()
        else:
            call.enter(body)

    @staticmethod
    def _said(call: Any, body: Buffer | None) -> None:
        """A message of a call whose client streams, or their end; the call may be over."""
        if call is not None and body is not None:
            call.put(body)
        elif call is not None:
            call.stream.ended = True
            call.complete()

    def _body(self, body: bytes | BodySpan, fd: int) -> Buffer:
        """A body where it lies; its memory is the receiver's again when nobody has a view of it any more."""
        if isinstance(body, bytes):
            return body
        if fd >= 0:
            region = MemoryRegion.take(fd)
            region.drop_descriptor()
            return region.memory[: body.size]
        if body.offset < 0 or body.offset + body.size > self._region.size:
            raise ValueError("a body lies outside of its memory")
        array: Any = np.frombuffer(self._region.map, np.uint8, body.size, body.offset)
        self._lent[body.offset] = weakref.ref(array, partial(self._on_unused, body.offset))
        return array.tobytes() if body.size < _COPY_BELOW else memoryview(array)

    def _on_unused(self, offset: int, array: object) -> None:
        """Nobody has a view of a body any more; in whatever thread, so that nothing is sent from here."""
        del self._lent[offset]
        self._freed.append(offset)

    def _free(self) -> None:
        freed, self._freed = self._freed, []
        if freed:
            self._channel.post(handover.Freed(freed))

    def _end(self) -> None:
        """The process is gone, and its callers with it."""
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._channel.close()
        self._output.close()
        process.stop(self._child)
        for partner in self._open.values():
            partner.leave()
        self._open.clear()
        self._room.set()
        self._pool.on_end(self, self._reason or process.describe_exit(self._child.wait()))
        self._pool.spawn(asyncio.to_thread(self._region.close))  # which takes as long as a hundred requests


class ReceiverPool:
    """So many receivers, which all listeners of a server share."""

    def __init__(self, count: int, *, files: tuple[str, str, str] | None = None) -> None:
        """`files` are certificate, key and authorities of clients, which each receiver reads and watches itself."""
        self.files = files
        self.sites: list[tuple[Site, ReceiverSite]] = []
        self.changed = asyncio.Event()  # set when a receiver is ready, has closed a site, or is gone
        self.restarts = 0
        self._count = count
        self._receivers: list[ReceiverProcess] = []
        self._crashes = 0
        self._closing = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._seen = time.monotonic()

    async def open(self) -> ReceiverPool:
        """Start them all, and wait until they are ready. Raises Unavailable where one cannot be."""
        try:
            for _ in range(self._count):
                await self._start()
            while not all(receiver.ready for receiver in self._receivers):
                if len(self._receivers) < self._count:
                    raise Unavailable("a receiver does not start", hint="its last lines are in the log")
                await self.wait()
        except BaseException:
            await self.close()
            raise
        self._beat()
        return self

    async def wait(self) -> None:
        """Until something changes."""
        self.changed.clear()
        await self.changed.wait()

    def _beat(self) -> None:
        before, self._seen = self._seen, time.monotonic()
        for receiver in self._receivers:
            receiver.heard += max(0.0, self._seen - before - _BEAT)  # when we were held up, nobody is blamed
            receiver.beat(self._seen)
        self._timer = self._loop.call_later(_BEAT, self._beat)

    def serve(self, site: Site, *, grpc_only: bool, origins: Sequence[str]) -> int:
        """One more site at all receivers, who share its limits; its number."""
        limits, count = site.limits, self._count
        share = {"connections": -(-limits.connections // count), "bodies": -(-limits.bodies // count)}
        rpcs = {path: rpc.stream is not None for path, rpc in site.rpcs.items()}
        limits = msgspec.structs.replace(limits, **share)
        self.sites.append((site, ReceiverSite(grpc_only, limits, tuple(origins), rpcs)))
        for receiver in self._receivers:
            receiver.serve(*self.sites[-1])
        return len(self.sites) - 1

    @property
    def ready(self) -> list[ReceiverProcess]:
        """Those that take connections."""
        return [receiver for receiver in self._receivers if receiver.ready]

    def on_end(self, receiver: ReceiverProcess, reason: str) -> None:
        """A receiver is gone: replace it, at once if it had been ready."""
        self._receivers.remove(receiver)
        self.changed.set()
        if self._closing.is_set():
            return
        _log.warning("receiver %d %s", receiver.pid, reason)
        self.restarts += 1
        self._crashes = 0 if receiver.ready else self._crashes + 1
        if self._timer is not None:  # else the server does not start, which is told to whoever starts it
            self.spawn(self._replace())

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what `close` waits for."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self) -> None:
        """One more. Raises Unavailable when memory, processes or descriptors have run out."""
        region = await asyncio.to_thread(MemoryRegion.make, _MEMORY)
        if self._closing.is_set():
            region.close()
        else:
            self._receivers.append(ReceiverProcess(self, region))

    async def _replace(self) -> None:
        pause = min(30.0, 0.05 * 2**self._crashes) if self._crashes else 0.0
        while not await self._closes(pause):
            try:
                await self._start()
                return
            except Unavailable as fault:
                _log.warning("%s", fault)
                pause = 5.0

    async def _closes(self, pause: float) -> bool:
        """Whether the pool closes within so many seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), pause)
        return self._closing.is_set()

    async def close(self) -> None:
        """End them all."""
        self._closing.set()
        if self._timer is not None:
            self._timer.cancel()
        for receiver in self._receivers:
            receiver.kill("")
        while self._receivers:
            await self.wait()
        while self._tasks:
            await asyncio.wait(self._tasks)


class PooledListener:
    """A Listener whose connections are dealt out to receivers; Listener says what its methods do."""

    def __init__(self, pool: ReceiverPool, index: int, server: asyncio.Server) -> None:
        """`server` is bound, and does not serve."""
        self._pool, self._index, self._server = pool, index, server
        self._loop = asyncio.get_running_loop()
        self._sockets = [socket.socket(fileno=os.dup(one.fileno())) for one in server.sockets]
        self.port = int(self._sockets[0].getsockname()[1])
        for sock in self._sockets:
            sock.setblocking(False)
            sock.listen(1024)
        self._resume()

    def _resume(self) -> None:
        for sock in self._sockets:
            self._loop.add_reader(sock.fileno(), self._accept, sock)

    def _pause(self, seconds: float) -> None:
        for sock in self._sockets:
            self._loop.remove_reader(sock.fileno())
        self._loop.call_later(seconds, self._resume)

    def _accept(self, sock: socket.socket) -> None:
        """Give each new connection to the receiver that has the fewest."""
        for _ in range(_AT_ONCE):
            if not (ready := self._pool.ready):
                self._pause(0.05)
                return
            try:
                peer, _ = sock.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError as fault:  # no descriptors are left
                _log.warning("no connection can be accepted: %s", fault)
                self._pause(1.0)
                return
            min(ready, key=lambda one: one.connections).connect(self._index, peer)

    def drain(self) -> None:
        for receiver in self._pool.ready:
            receiver.retire(self._index)

    async def close(self, *, grace: float = 10.0) -> None:
        for sock in self._sockets:
            self._loop.remove_reader(sock.fileno())
            sock.close()
        self._sockets = []
        self._server.close()
        asked = self._pool.ready
        for receiver in asked:
            receiver.retire(self._index, grace)
        with suppress(TimeoutError):
            async with asyncio.timeout(grace + 1.0):
                while any(one in self._pool.ready and self._index not in one.closed for one in asked):
                    await self._pool.wait()
