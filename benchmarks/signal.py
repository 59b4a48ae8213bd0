"""What it costs to tell a worker that a batch is there, and to be told that it is done: four ways, side by side.

    python -m benchmarks.signal

Round trip: one message at a time. Pipelined: 64 under way. Every message is the descriptor of a batch of 32 rows.
"""

from __future__ import annotations

import os
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
from rich.console import Console
from rich.table import Table

from torchship import process
from torchship.serve.engine.ipc.arena import ArenaBlock
from torchship.serve.engine.ipc.messages import (
    BatchDone,
    PackedCall,
    Result,
    RunBatch,
    decode_order,
    decode_report,
    encode,
)
from torchship.serve.ipc.memory import MemoryRegion
from torchship.serve.ipc.packets import Inbox, send

ROUNDS, TRIPS, DEPTH = 5, 2000, 64
RUN = RunBatch(1, 0, [PackedCall([1] * 32, [ArenaBlock((32, 16), 0, 2048)])])
DONE = BatchDone(1, 0, 0, [Result(0, [1] * 32, [ArenaBlock((32, 10), 4096, 1280)])])
SLOT = struct.Struct("<II")


class End(Protocol):
    """One side of a channel."""

    def put(self) -> None:
        """Send one descriptor."""

    def get(self) -> None:
        """RunBatch one descriptor and decode it."""


class ZeroMq:
    """PAIR sockets over ipc in a private folder, msgpack."""

    def __init__(self, address: str, *, host: bool) -> None:
        import zmq

        self._context = zmq.Context()
        self._sock = self._context.socket(zmq.PAIR)
        (self._sock.bind if host else self._sock.connect)(address)
        self._message: RunBatch | BatchDone = RUN if host else DONE
        self._decode: Callable[[bytes | memoryview], object] = decode_report if host else decode_order

    def put(self) -> None:
        self._sock.send(encode(self._message))

    def get(self) -> None:
        self._decode(self._sock.recv())


class SeqPacket:
    """A Unix seqpacket socket, msgpack: what the line uses."""

    def __init__(self, sock: socket.socket, *, host: bool) -> None:
        self._sock = sock
        self._inbox = Inbox(sock)
        self._message: RunBatch | BatchDone = RUN if host else DONE
        self._decode: Callable[[bytes | memoryview], object] = decode_report if host else decode_order

    def put(self) -> None:
        send(self._sock, encode(self._message))

    def get(self) -> None:
        message, _ = self._inbox.next()
        if not message:
            raise ConnectionError("the host is gone")
        self._decode(message)


class SeqPacketStruct:
    """The same with 8 bytes packed by struct: only enough for fixed shapes without parameters."""

    def __init__(self, sock: socket.socket, *, host: bool) -> None:
        self._sock = sock

    def put(self) -> None:
        self._sock.send(SLOT.pack(1, 32))

    def get(self) -> None:
        message = self._sock.recv(64)
        if not message:
            raise ConnectionError("the host is gone")
        SLOT.unpack(message)


class EventFd:
    """An eventfd each way, the msgpack descriptors in a ring of shared memory."""

    def __init__(self, region: MemoryRegion, *, fds: tuple[int, int], host: bool) -> None:
        self._memory = region.memory
        self._out, self._in = fds if host else fds[::-1]
        self._message: RunBatch | BatchDone = RUN if host else DONE
        self._decode: Callable[[bytes | memoryview], object] = decode_report if host else decode_order
        self._write, self._read = (0, 2**15) if host else (2**15, 0)
        self._sent = self._got = 0

    def put(self) -> None:
        data = encode(self._message)
        at = self._write + (self._sent % 128) * 256
        self._memory[at : at + 2 + len(data)] = struct.pack("<H", len(data)) + data
        self._sent += 1
        os.eventfd_write(self._out, 1)

    def get(self) -> None:
        os.eventfd_read(self._in)  # made with EFD_SEMAPHORE: one wake-up a message
        at = self._read + (self._got % 128) * 256
        (size,) = struct.unpack_from("<H", self._memory, at)
        self._decode(bytes(self._memory[at + 2 : at + 2 + size]))
        self._got += 1


def echo(argument: Any) -> None:
    """The worker: answers until it is killed."""
    kind, given = argument
    end = join(kind, given)
    while True:
        end.get()
        end.put()


def join(kind: str, given: Any) -> End:
    """The worker's end."""
    if kind == "zeromq":
        return ZeroMq(given, host=False)
    if kind == "eventfd":
        memory, *fds = given
        return EventFd(MemoryRegion.take(memory), fds=(fds[0], fds[1]), host=False)
    sock = socket.socket(fileno=given)
    return SeqPacket(sock, host=False) if kind == "seqpacket" else SeqPacketStruct(sock, host=False)


def make(kind: str, folder: Path) -> tuple[End, Any, tuple[int, ...], Callable[[], None]]:
    """The host's end, what the worker must know, the descriptors it gets, and what to do once it has started."""
    if kind == "zeromq":
        address = f"ipc://{folder}/signal"
        return ZeroMq(address, host=True), address, (), lambda: None
    if kind == "eventfd":
        region = MemoryRegion.make(2**16)
        fds = (os.eventfd(0, os.EFD_SEMAPHORE), os.eventfd(0, os.EFD_SEMAPHORE))
        return EventFd(region, fds=fds, host=True), [region.fd, *fds], (region.fd, *fds), lambda: None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end: End = SeqPacket(ours, host=True) if kind == "seqpacket" else SeqPacketStruct(ours, host=True)
    return end, theirs.fileno(), (theirs.fileno(),), theirs.close


def measure(kind: str) -> tuple[float, float, float]:
    """Microseconds of a round trip, of a message among 64 under way, and of the host's own CPU for the latter."""
    with tempfile.TemporaryDirectory(prefix="torchship-signal-") as folder:
        end, given, fds, started = make(kind, Path(folder))
        child = process.spawn("benchmarks.signal:echo", argument=[kind, given], fds=fds)
        started()
        try:
            single, many, cpu = [], [], []
            end.put()
            end.get()
            for _ in range(ROUNDS):
                single.append(round_trips(end))
                before = time.process_time()
                many.append(pipelined(end))
                cpu.append((time.process_time() - before) / TRIPS * 1e6)
            return statistics.median(single), statistics.median(many), statistics.median(cpu)
        finally:
            process.stop(child)


def round_trips(end: End) -> float:
    """Microseconds a message, one at a time."""
    began = time.perf_counter()
    for _ in range(TRIPS):
        end.put()
        end.get()
    return (time.perf_counter() - began) / TRIPS * 1e6


def pipelined(end: End) -> float:
    """Microseconds a message with many under way."""
    began = time.perf_counter()
    for _ in range(DEPTH):
        end.put()
    for _ in range(TRIPS - DEPTH):
        end.get()
        end.put()
    for _ in range(DEPTH):
        end.get()
    return (time.perf_counter() - began) / TRIPS * 1e6


KINDS = {
    "zeromq": "ZeroMQ PAIR over ipc, msgpack",
    "seqpacket": "Unix seqpacket, msgpack, can carry descriptors",
    "struct": "Unix seqpacket, 8 bytes by struct",
    "eventfd": "eventfd, msgpack in shared memory",
}


def main() -> None:
    """Measure all, print the table and the line for machines."""
    table = Table("way", "round trip µs", "pipelined µs", "host CPU µs", title="a batch descriptor there and back")
    found = {}
    for kind, about in KINDS.items():
        found[kind] = measure(kind)
        table.add_row(about, *(f"{value:.1f}" for value in found[kind]))
    Console().print(table)
    trip, many = (found["zeromq"][i] / found["seqpacket"][i] for i in (0, 1))
    facts = {f"{kind}_us": round(values[0], 2) for kind, values in found.items()}
    facts |= {"round_trip_vs_zeromq_x": round(trip, 2), "pipelined_vs_zeromq_x": round(many, 2)}
    print(" ".join(f"{key}={value}" for key, value in facts.items()))


if __name__ == "__main__":
    assert len(msgspec.msgpack.encode(RUN)) < 250  # a ring entry of the eventfd way
    main()
