"""What the host and a worker say to each other: msgpack messages over a private Unix seqpacket socket.

Tensors never travel here; a message says where they lie in shared memory. Nothing is pickled and nothing is typed
loosely: what does not decode is a fault of the worker that sent it. A message of any size arrives: a large one lies in
memory of its own, whose descriptor is sent instead, so that the socket's buffer never fills up.
"""

from __future__ import annotations

import array
import os
import select
import socket
import time
from typing import TypeAlias

import msgspec

from torchship.pipeline.faults import Fault
from torchship.serve.engine.ipc.arena import ArenaBlock
from torchship.stage import Value

INLINE = 2**13  # bytes; a batch of 400 jobs. A dozen such messages fit into a socket that nobody reads
_LARGE = b"\xc1"  # the byte that msgpack never begins with: the message lies in the first descriptor
_ROOM = socket.CMSG_SPACE(2 * array.array("i").itemsize)


class PackedCall(msgspec.Struct, array_like=True, frozen=True):
    """One call of the stage: rows of each job in it, the tensors in the order of the inputs, the request's values.

    An optional input that the jobs do not bring has None for its block.
    """

    rows: list[int]
    blocks: list[ArenaBlock | None]
    values: dict[str, Value] = {}
    stream: bool = False


class RunBatch(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """Host to worker: run these calls; the tensors lie in `slot`, or in the memory that comes along."""

    number: int
    slot: int
    calls: list[PackedCall]


class Ping(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """Host to worker: are you there?"""

    number: int


class Stop(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """Host to worker: close the stage and leave."""


class Taken(msgspec.Struct, array_like=True, frozen=True, tag=4):
    """Host to worker: the caller has taken one more answer of the stream `number`."""

    number: int


class Drop(msgspec.Struct, array_like=True, frozen=True, tag=5):
    """Host to worker: nobody waits for the rest of the stream `number`."""

    number: int


class Result(msgspec.Struct, array_like=True, frozen=True):
    """Answers of neighbouring jobs: from job `first` on, `rows[i]` rows for each, the outputs in their order."""

    first: int
    rows: list[int]
    blocks: list[ArenaBlock]


class BatchDone(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """Worker to host: what became of a RunBatch; `more` announces further answers of a stream, `last` that the process
    ends: what waits behind has not run.

    `began` and `ended` are nanoseconds of the system's monotonic clock, which all processes share.
    """

    number: int
    began: int
    ended: int
    results: list[Result]
    faults: list[Fault] = []
    more: bool = False
    last: bool = False


class Pong(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """Worker to host: I am here."""

    number: int


class CardMemory(msgspec.Struct, array_like=True, frozen=True):
    """Bytes of a card when a stage had opened there: what its process held, what was free, and all."""

    held: int
    free: int
    total: int

    def holds_another(self, *, share: float) -> bool:
        """Whether what is free holds two more like it, one of them for a reload, and this share of the card two."""
        return 2 * self.held <= min(self.free, share * self.total)


class Opened(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """Worker to host: the stage is open and warm, on a `card` where it has one. `signature` is its own, as text, to be
    compared."""

    signature: str
    card: CardMemory | None = None


class OpenFailed(msgspec.Struct, array_like=True, frozen=True, tag=4):
    """Worker to host: the stage could not be opened."""

    fault: Fault


Order: TypeAlias = RunBatch | Ping | Stop | Taken | Drop
Report: TypeAlias = BatchDone | Pong | Opened | OpenFailed

encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_report = msgspec.msgpack.Decoder(Report).decode


def send(sock: socket.socket, message: bytes, *, fd: int = -1) -> None:
    """Send one message, and a descriptor with it. Raises OSError."""
    fds = [] if fd < 0 else [fd]
    if len(message) > INLINE:
        with os.fdopen(os.memfd_create("torchship-message", os.MFD_CLOEXEC), "wb") as file:
            file.write(message)
            file.flush()
            socket.send_fds(sock, [_LARGE], [file.fileno(), *fds])
    elif fds:
        socket.send_fds(sock, [message], fds)
    else:
        sock.send(message)


class Inbox:
    """Reads messages into one buffer that is made once: a fresh one of this size for each message costs 15 µs."""

    def __init__(self, sock: socket.socket) -> None:
        self._receive = sock.recvmsg_into
        self._buffer = bytearray(INLINE)
        self._into = [self._buffer]
        self._view = memoryview(self._buffer)
        watch = select.poll()
        watch.register(sock, select.POLLIN)
        self._poll = watch.poll

    @property
    def waiting(self) -> bool:
        """Whether there is something to read."""
        return bool(self._poll(0))

    def next(self, *, patience: int = 0) -> tuple[memoryview, int]:
        """One message, valid until the next, and the descriptor that came with it, or -1.

        For `patience` nanoseconds it looks again and again, which is quicker than to be woken; others may use the
        core meanwhile. An empty message: the other side is gone. Raises OSError.
        """
        if patience:
            poll, until = self._poll, time.monotonic_ns() + patience
            while not poll(0) and time.monotonic_ns() < until:
                os.sched_yield()
        size, extra, flags, _ = self._receive(self._into, _ROOM, socket.MSG_CMSG_CLOEXEC)
        message = self._view[:size]
        if not extra:
            return message, -1
        fds = _descriptors(extra, flags)
        if message == _LARGE:
            with os.fdopen(fds.pop(0), "rb") as file:
                file.seek(0)
                message = memoryview(file.read())
        if len(fds) > 1:
            for fd in fds:
                os.close(fd)
            raise OSError("a message came with more than one descriptor")
        return message, fds[0] if fds else -1


def _descriptors(extra: list[tuple[int, int, bytes]], flags: int) -> list[int]:
    fds = array.array("i")
    for level, kind, data in extra:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if flags & socket.MSG_CTRUNC or not fds:
        for fd in fds:
            os.close(fd)
        raise OSError("a message came with more descriptors than it may, or this process has no room for them")
    return list(fds)
