"""What the host and a worker say to each other: small msgpack messages over a private Unix seqpacket socket.

Tensors never travel here; a message says where they lie in shared memory. Nothing is pickled and nothing is typed
loosely: what does not decode is a fault of the worker that sent it.
"""

from __future__ import annotations

import array
import os
import select
import socket
import time
from typing import TypeAlias

import msgspec

from torchship import errors
from torchship.errors import StageFailed, TorchshipError
from torchship.serve.engine.ipc.arena import Block
from torchship.stage import Value

LIMIT = 2**18  # bytes; a message of 4,000 jobs takes about 80 KiB
ROOM = socket.CMSG_SPACE(array.array("i").itemsize)


class Call(msgspec.Struct, array_like=True, frozen=True):
    """One call of the stage: rows of each job in it, the tensors in the order of the inputs, the request's values."""

    rows: list[int]
    blocks: list[Block]
    values: dict[str, Value] = {}
    stream: bool = False


class Take(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """Host to worker: run these calls; the tensors lie in `slot`, or in the memory that comes along."""

    number: int
    slot: int
    calls: list[Call]


class Ping(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """Host to worker: are you there?"""

    number: int


class Stop(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """Host to worker: close the stage and leave."""


class Fault(msgspec.Struct, array_like=True, frozen=True):
    """Why a job has no answer; `kind` is the name of an error class, `job` counts within the Take."""

    job: int
    kind: str
    message: str
    hint: str = ""


class Piece(msgspec.Struct, array_like=True, frozen=True):
    """Answers of neighbouring jobs: from job `first` on, `rows[i]` rows for each, the outputs in their order."""

    first: int
    rows: list[int]
    blocks: list[Block]


class Gave(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """Worker to host: what became of a Take; `more` announces further answers of a stream.

    `began` and `ended` are nanoseconds of the system's monotonic clock, which all processes share.
    """

    number: int
    began: int
    ended: int
    pieces: list[Piece]
    faults: list[Fault] = []
    more: bool = False


class Pong(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """Worker to host: I am here, `resident` bytes large."""

    number: int
    resident: int = 0


class Opened(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """Worker to host: the stage is open and warm. `signature` is its own, as text, to be compared."""

    signature: str
    seconds: float
    resident: int


class Refused(msgspec.Struct, array_like=True, frozen=True, tag=4):
    """Worker to host: the stage could not be opened."""

    fault: Fault


Order: TypeAlias = Take | Ping | Stop
Report: TypeAlias = Gave | Pong | Opened | Refused

_KINDS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, TorchshipError)
}
_FOREIGN = "Exception"  # any error that is not of our tree
encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_report = msgspec.msgpack.Decoder(Report).decode


def describe(fault: BaseException, *, job: int = 0) -> Fault:
    """An exception as data: errors of our own keep their kind, all others become StageFailed."""
    if isinstance(fault, TorchshipError):
        return Fault(job, type(fault).__name__, str(fault)[:2000], fault.hint[:2000])
    whole = str(fault)
    text = whole.partition("\n")[0] if "CUDA error" in whole else " ".join(whole.split())[:2000]  # the rest is advice
    return Fault(job, _FOREIGN, f"raised {type(fault).__name__}: {text}" if text else f"raised {type(fault).__name__}")


def revive(fault: Fault, *, stage: str) -> TorchshipError:
    """The error that a Fault describes; it names the stage."""
    colon = " " if fault.kind == _FOREIGN else ": "
    return _KINDS.get(fault.kind, StageFailed)(f"stage {stage!r}{colon}{fault.message}", hint=fault.hint)


def send(sock: socket.socket, message: bytes, *, fd: int = -1) -> None:
    """Send one message, and a descriptor with it. Raises OSError."""
    if fd < 0:
        sock.send(message)
    else:
        socket.send_fds(sock, [message], [fd])


class Inbox:
    """Reads messages into one buffer that is made once: a fresh one of this size for each message costs 15 µs."""

    def __init__(self, sock: socket.socket) -> None:
        self._receive = sock.recvmsg_into
        self._buffer = bytearray(LIMIT)
        self._into = [self._buffer]
        self._view = memoryview(self._buffer)
        watch = select.poll()
        watch.register(sock, select.POLLIN)
        self._poll = watch.poll

    def next(self, *, patience: int = 0) -> tuple[memoryview, int]:
        """One message, valid until the next, and the descriptor that came with it, or -1.

        For `patience` nanoseconds it looks again and again, which is quicker than to be woken; others may use the
        core meanwhile. An empty message: the other side is gone. Raises OSError.
        """
        if patience:
            self._look(time.monotonic_ns() + patience)
        size, extra, flags, _ = self._receive(self._into, ROOM, socket.MSG_CMSG_CLOEXEC)
        message = self._view[:size]
        return (message, _descriptor(extra, flags)) if extra else (message, -1)

    def _look(self, until: int) -> None:
        """Return as soon as there is something to read."""
        poll = self._poll
        while not poll(0) and time.monotonic_ns() < until:
            os.sched_yield()


def _descriptor(extra: list[tuple[int, int, bytes]], flags: int) -> int:
    fds = array.array("i")
    for level, kind, data in extra:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if flags & socket.MSG_CTRUNC or len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise OSError("a message came with more than one descriptor")
    return fds[0]
