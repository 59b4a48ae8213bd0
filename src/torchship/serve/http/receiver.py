"""A receiver: a process that runs connections and hands what they ask to the host, which runs the endpoints.

It is `serve.http` with other endpoints: TLS, framing, limits, time-outs, compression and slow peers are dealt with
here, and a body is written into memory that the host sees too.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import weakref
from bisect import insort
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
import numpy as np
import uvloop

from torchship.serve.http import handover
from torchship.serve.http.exchange import Exchange, Head
from torchship.serve.http.handover import AHEAD, HEADS, BodySpan, ReceiverSite
from torchship.serve.http.http1 import Connection
from torchship.serve.http.http2.calls import Call
from torchship.serve.http.http2.connection import Connection2
from torchship.serve.http.listen import HANDSHAKE, Certificates
from torchship.serve.http.site import Cors, Rpc, Site
from torchship.serve.ipc.channel import Channel
from torchship.serve.ipc.memory import MemoryRegion
from torchship.wire.raw import Buffer

_INLINE = 1 << 12  # bytes of a body that travel in the message


def main(argument: Any, sock: socket.socket) -> None:
    """The child's entry point: runs until the host, at the other end of `sock`, goes away.

    `argument` is the descriptor of its memory, and the files of its certificate (or nothing).
    """
    fd, files = msgspec.convert(argument, tuple[int, tuple[str, str, str] | None])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # the host alone decides
        signal.signal(number, signal.SIG_IGN)
    region = MemoryRegion.take(fd)
    region.drop_descriptor()
    uvloop.run(_run(region, files, sock))


async def _run(region: MemoryRegion, files: tuple[str, str, str] | None, sock: socket.socket) -> None:
    certificates = Certificates(files[0], key=files[1], clients=files[2]) if files else None
    receiver = Receiver(region, sock, certificates)
    watching = asyncio.ensure_future(certificates.watch()) if certificates else None
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    await receiver.beat()
    if watching is not None:
        watching.cancel()


class Spans:
    """Which parts of a memory are free."""

    def __init__(self, size: int) -> None:
        self._free = [(0, size)]  # offset and size, in order; neighbours are joined
        self._taken: dict[int, int] = {}

    def take(self, size: int) -> int:
        """The offset of `size` free bytes, which are free no more; -1 where there are not so many together."""
        size = -(-size // 64) * 64
        for place, (offset, free) in enumerate(self._free):
            if free >= size:
                self._free[place : place + 1] = [(offset + size, free - size)] if free > size else []
                self._taken[offset] = size
                return offset
        return -1

    def give(self, offset: int) -> None:
        """What was taken at `offset` is free again."""
        size, free = self._taken.pop(offset), self._free
        insort(free, (offset, size))
        place = free.index((offset, size))
        if place + 1 < len(free) and offset + size == free[place + 1][0]:
            size += free.pop(place + 1)[1]
        if place and sum(free[place - 1]) == offset:
            offset, size = free[place - 1][0], free[place - 1][1] + size
            del free[place]
            place -= 1
        free[place] = offset, size


class _Job:
    """What an exchange or a call cancels when its caller leaves."""

    __slots__ = ("_number", "_receiver")

    def __init__(self, receiver: Receiver, number: int) -> None:
        self._receiver, self._number = receiver, number

    def cancel(self) -> None:
        self._receiver.leave(self._number)


class Receiver:
    """The connections of this process, the exchanges and calls that the host works on, and the memory for bodies."""

    def __init__(self, region: MemoryRegion, sock: socket.socket, certificates: Certificates | None) -> None:
        self._region, self._spans, self._certificates = region, Spans(region.size), certificates
        self._rooms: dict[int, tuple[int, weakref.ref[Any]]] = {}  # where bodies arrive: offsets by their arrays
        self._open: dict[int, Exchange | Call] = {}
        self._credit: dict[int, asyncio.Semaphore] = {}  # of calls whose client streams
        self._last = self._heads = 0
        self._sites: list[tuple[Site, Callable[[], Connection | Connection2]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._channel = Channel(
            sock, decode=handover.decode_from_host, on_event=self._on_event, on_end=lambda why: self._ended.set()
        )
        self._post = self._channel.post

    async def beat(self) -> None:
        """Tick once a second, and say so, until the host is gone."""
        while not self._ended.is_set():
            for site, _ in self._sites:
                site.tick(self._loop.time())
            self._post(handover.Beat())
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), 1.0)

    # -- connections ------------------------------------------------------------------------------------------------

    def _serve(self, about: ReceiverSite) -> None:
        index = len(self._sites)
        unary, stream = Rpc(unary=partial(self._call, index)), Rpc(stream=partial(self._stream, index))
        rpcs = {path: stream if streams else unary for path, streams in about.rpcs.items()}
        cors = Cors(about.origins) if about.origins else None
        site = Site(
            partial(self._resolve, index), about.limits, rpcs=rpcs, cors=cors, on_gone=self._hung_up, room=self._room
        )
        site.tick(self._loop.time())
        self._sites.append((site, partial(Connection2 if about.grpc_only else Connection, site)))

    def _hung_up(self) -> None:
        self._post(handover.HungUp())

    async def _accept(self, protocol: Callable[[], Connection | Connection2], sock: socket.socket) -> None:
        tls = self._certificates.context if self._certificates else None
        try:
            await self._loop.connect_accepted_socket(
                protocol, sock, ssl=tls, ssl_handshake_timeout=HANDSHAKE if tls else None
            )
        except OSError:  # it left during its handshake, or is a stranger
            sock.close()
            self._hung_up()

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _retire(self, index: int, grace: float | None) -> None:
        site, _ = self._sites[index]
        site.drain()
        if grace is not None:
            await site.close(grace=grace)
            self._post(handover.HungUp(index))

    # -- to the host ------------------------------------------------------------------------------------------------

    def _resolve(self, index: int, head: Head) -> None:
        head.endpoint = partial(self._ask, index)

    def _ask(self, index: int, exchange: Exchange) -> None:
        exchange.job = _Job(self, self._begin(index, exchange, exchange.body))
        exchange.body = b""

    def _call(self, index: int, call: Call, message: Buffer, start: int) -> None:
        call.job = _Job(self, self._begin(index, call, message))

    async def _stream(self, index: int, call: Call) -> None:
        """Hand on the messages of a call as the host takes them, until both have said all."""
        number = self._begin(index, call, b"")
        credit = self._credit[number] = asyncio.Semaphore(AHEAD)
        try:
            async for message in call.messages():
                await credit.acquire()
                if number in self._open:
                    body, fd = self._shared(message)
                    self._post(handover.Said(number, body), fd)
            self._post(handover.Said(number))
            while number in self._open:
                await credit.acquire()
        finally:
            del self._credit[number]
            self.leave(number)

    def _begin(self, index: int, partner: Exchange | Call, body: Buffer) -> int:
        """Hand a request to the host; its number. Raises Unavailable where there is no memory for its body."""
        shared, fd = self._shared(body)
        head, rpc = partner.head, isinstance(partner, Call)
        if head.memo is None or head.memo <= self._heads - HEADS:
            self._heads += 1
            head.memo = self._heads
            self._post(
                handover.NewHead(
                    head.memo, index, rpc, head.method, head.path, head.query, dict(head.headers), head.timeout
                )
            )
        self._last += 1
        self._open[self._last] = partner
        self._post(handover.NewRequest(self._last, head.memo, shared), fd)
        return self._last

    def _shared(self, body: Buffer) -> tuple[bytes | BodySpan, int]:
        """A body as it travels, and the descriptor of its memory where ours has no room. Raises Unavailable."""
        size = len(body)
        if size <= _INLINE:
            return bytes(body), -1
        if isinstance(body, memoryview) and id(body.obj) in self._rooms:
            return BodySpan(self._rooms.pop(id(body.obj))[0], size), -1
        offset = self._spans.take(size)
        if offset >= 0:
            self._region.memory[offset : offset + size] = body
            return BodySpan(offset, size), -1
        region = MemoryRegion.make(size)
        region.memory[:size] = body
        fd, region.fd = region.fd, -1
        region.close()
        return BodySpan(-1, size), fd

    def _room(self, size: int) -> memoryview | None:
        """Shared memory that a body is read to; free again when nobody holds it before it is handed over."""
        if (offset := self._spans.take(size)) < 0:
            return None
        array: Any = np.frombuffer(self._region.map, np.uint8, size, offset)
        self._rooms[id(array)] = offset, weakref.ref(array, partial(self._unused, id(array)))
        return memoryview(array)

    def _unused(self, key: int, array: object) -> None:
        self._spans.give(self._rooms.pop(key)[0])

    def leave(self, number: int) -> None:
        """The caller went away: the host need not answer."""
        if self._open.pop(number, None) is not None:
            self._post(handover.Left(number))

    # -- from the host ----------------------------------------------------------------------------------------------

    def _on_event(self, event: Any, fd: int) -> None:
        match event:
            case handover.Answered() | handover.Ended():
                if (partner := self._done(event.number)) is not None:
                    self._finish(partner, event)
            case handover.Freed():
                for offset in event.offsets:
                    self._spans.give(offset)
            case handover.Began() if isinstance(exchange := self._open.get(event.number), Exchange):
                exchange.begin(status=event.status, content_type=event.content_type, headers=event.headers)
            case handover.Wrote() if (partner := self._open.get(event.number)) is not None:
                partner.write(event.data)
                self._spawn(self._drained(event.number, partner))
            case handover.MessageTaken() if event.number in self._credit:
                self._credit[event.number].release()
            case handover.Connect():
                self._spawn(self._accept(self._sites[event.site][1], socket.socket(fileno=fd)))
            case handover.Serve():
                self._serve(event.site)
            case handover.Retire():
                self._spawn(self._retire(event.site, event.grace))

    @staticmethod
    def _finish(partner: Any, event: handover.Answered | handover.Ended) -> None:
        if isinstance(partner, Call):
            if isinstance(event, handover.Ended):
                partner.end(event.fields)
            else:
                partner.reply(event.body)
        elif isinstance(event, handover.Ended):
            partner.end()
        else:
            partner.plain = event.plain
            partner.answer(event.body, status=event.status, content_type=event.content_type, headers=event.headers)

    def _done(self, number: int) -> Any:
        """The exchange or call that the host has ended; None where its caller has left."""
        partner = self._open.pop(number, None)
        if number in self._credit:
            self._credit[number].release()
        elif partner is not None:
            partner.job = None
        return partner

    async def _drained(self, number: int, partner: Exchange | Call) -> None:
        await partner.drained()
        if number in self._open:
            self._post(handover.MessageTaken(number))
