"""The host's side of one worker process: start it, hand it batches, collect its answers, notice its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np

from torchship import process
from torchship.errors import StageFailed, TorchshipError, Unavailable
from torchship.serve.engine.ipc import arena
from torchship.serve.engine.ipc.arena import Arena, Block, Region
from torchship.serve.engine.ipc.signals import (
    LIMIT,
    Call,
    Gave,
    Inbox,
    Opened,
    Ping,
    Pong,
    Refused,
    Stop,
    Take,
    decode_report,
    encode,
    revive,
    send,
)
from torchship.serve.engine.queue import Visit
from torchship.serve.engine.worker import Post
from torchship.tensors import Array, numpy_dtype

_RAW = {tuple}
_LINES = 20
_LINE = 2000


class Blueprint(msgspec.Struct, frozen=True, kw_only=True):
    """How to make one worker of a station. Sizes are bytes a slot, times are seconds.

    `fits`: every batch that the station makes fits into a slot, so that nothing needs to be measured; then `inputs`
    are the datatype and the shape of a row of each input.
    """

    name: str
    opener: str
    stage: Any
    signature: str
    batched: bool
    fits: bool = False
    inputs: tuple[tuple[str, tuple[int, ...]], ...] = ()
    depth: int = 2
    input_size: int = 2**20
    output_size: int = 2**20
    private: bool = True
    warm: bool = False
    threads: int | None = None
    cpus: tuple[int, ...] = ()
    nice: int = 0
    env: dict[str, str] = {}
    open_timeout: float = 120.0


class Flight(msgspec.Struct, eq=False):
    """A batch that a worker holds."""

    number: int
    slot: int
    visits: list[Visit]
    sent: float
    stream: bool = False


class Boss(Protocol):
    """What a worker reports to: its station."""

    def opened(self, worker: Worker) -> None:
        """The worker is ready for its first batch."""

    def gave(self, worker: Worker, flight: Flight, gave: Gave, memory: memoryview) -> None:
        """An answer came. `memory` holds it until this call returns."""

    def ended(self, worker: Worker, flights: list[Flight], reason: str) -> None:
        """The worker is gone, and with it what it held, oldest first."""

    def said(self, worker: Worker, line: str) -> None:
        """The worker printed a line."""


@dataclass(slots=True)
class _Tail:
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES))
    rest: bytes = b""


class Worker:
    """One child process. `state` goes from opening to ready to stopping to ended, and never back."""

    def __init__(self, blueprint: Blueprint, *, boss: Boss, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the process. Raises Unavailable when memory or processes have run out."""
        self.blueprint = blueprint
        self.state = "opening"
        self.flights: deque[Flight] = deque()
        self.began = time.monotonic()
        self.heard = self.began
        self.resident = 0
        self.fault: TorchshipError | None = None
        self.served = 0
        self._reason = ""
        self._boss = boss
        self._loop = loop
        self._number = 0
        self._tail = _Tail()
        self.arena = Arena.make(
            depth=blueprint.depth, input_size=blueprint.input_size, output_size=blueprint.output_size
        )
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._inbox = Inbox(self._sock)
        self._deaf = False
        self._log, out = os.pipe()
        try:
            self._child = self._spawn(theirs.fileno(), out)
            self._pid = os.pidfd_open(self._child.pid)
        except OSError as fault:
            self.arena.close()
            self._sock.close()
            os.close(self._log)
            raise Unavailable(f"cannot start a worker for {blueprint.name!r}: {fault}") from None
        finally:
            theirs.close()
            os.close(out)
        self._listen()
        self._timer = loop.call_later(blueprint.open_timeout, self._late)
        self.ended: asyncio.Future[None] = loop.create_future()

    def _spawn(self, sock: int, out: int) -> subprocess.Popen[bytes]:
        plan = self.blueprint
        post = Post(
            sock=sock,
            memory=self.arena.region.fd,
            depth=plan.depth,
            input_size=self.arena.input_size,
            output_size=self.arena.output_size,
            opener=plan.opener,
            stage=plan.stage,
            private=plan.private,
            warm=plan.warm,
            nice=plan.nice,
        )
        return process.spawn(
            "torchship.serve.engine.worker:main",
            argument=post,
            fds=(sock, self.arena.region.fd),
            output=out,
            threads=plan.threads,
            cpus=plan.cpus,
            env={"PYTHONUNBUFFERED": "1"} | plan.env,
        )

    def _listen(self) -> None:
        self._sock.setblocking(False)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * LIMIT)
        os.set_blocking(self._log, False)
        self._loop.add_reader(self._sock.fileno(), self._hear)
        self._loop.add_reader(self._log, self._read_log)
        self._loop.add_reader(self._pid, self._end)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    @property
    def size(self) -> int:
        """Its resident memory in bytes, as the kernel says; 0 when it is gone."""
        try:
            with open(f"/proc/{self.pid}/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0

    @property
    def room(self) -> int:
        """How many more batches it takes now."""
        return self.arena.free if self.state == "ready" else 0

    def give(self, visits: list[Visit], *, now: float) -> None:
        """Write a batch into a slot and send it. Ask `room` first. Raises Unavailable when memory has run out."""
        slot = self.arena.acquire()
        self._number += 1
        region = None
        try:
            calls, region = self._pack(visits, slot)
            send(self._sock, encode(Take(self._number, slot, calls)), fd=region.fd if region else -1)
        except TorchshipError:
            self.arena.release(slot)
            raise
        except OSError:  # it died a moment ago: its end is on the way and takes the flight with it
            pass
        finally:
            if region:
                region.close()
        self.flights.append(Flight(self._number, slot, visits, now, visits[0].part is not None))

    def _pack(self, visits: list[Visit], slot: int) -> tuple[list[Call], Region | None]:
        start, end = self.arena.input_span(slot)
        need = 0 if self.blueprint.fits else self._measure(visits)
        region = None if need <= end - start else Region.make(need)
        memory, at = (region.memory, 0) if region else (self.arena.region.memory, start)
        groups = [visits] if self.blueprint.batched else [[visit] for visit in visits]
        calls = []
        for group in groups:
            rows = [visit.rows for visit in group]
            columns = zip(*[visit.arrays for visit in group], strict=True)
            kinds = {type(visit.arrays) for visit in group}
            blocks: list[Block] = []
            for index, column in enumerate(columns):
                if kinds == _RAW:
                    shape = (sum(rows), *self.blueprint.inputs[index][1])
                    block = arena.write_raw(column, memory=memory, offset=at, shape=shape)
                else:
                    arrays = column if tuple not in kinds else self._arrays(column, index)
                    block = arena.write(arrays, memory=memory, offset=at)
                blocks.append(block)
                at = arena.aligned(at + block.size)
            head = group[0]
            calls.append(Call(rows, blocks, head.values, head.part is not None))
        return calls, region

    def _arrays(self, column: Sequence[Any], index: int) -> list[Array]:
        """Rows of which some are bytes, as arrays."""
        dtype, axes = self.blueprint.inputs[index]
        kind = numpy_dtype(dtype)
        return [np.frombuffer(one, kind).reshape(-1, *axes) if type(one) is bytes else one for one in column]

    def _measure(self, visits: list[Visit]) -> int:
        """Bytes that a batch needs, each tensor beginning where it may."""
        padding = arena.ALIGN * len(visits[0].arrays) * (1 if self.blueprint.batched else len(visits))
        return padding + sum([arena.size_of(array) for visit in visits for array in visit.arrays])

    def _hear(self) -> None:
        """Read one report; the loop calls again while there are more."""
        try:
            message, fd = self._inbox.next()
            if message:
                self._report(message, fd)
                return
        except BlockingIOError:
            return
        except ConnectionError:
            pass
        except (OSError, msgspec.MsgspecError, StageFailed) as fault:
            self.kill(f"broke the line's protocol: {fault}")
            return
        self._deaf = True  # it died: the kernel reports the end in a moment
        self._loop.remove_reader(self._sock.fileno())

    def _report(self, message: memoryview, fd: int) -> None:
        region = Region.take(fd) if fd >= 0 else None
        try:
            report = decode_report(message)
            self.heard = time.monotonic()
            if isinstance(report, Gave):
                self._gave(report, region)
            elif isinstance(report, Pong):
                self.resident = report.resident
            elif isinstance(report, Opened):
                self._opened(report)
            elif isinstance(report, Refused):
                self.fault = revive(report.fault, stage=self.blueprint.name)
        finally:
            if region:
                region.close()

    def _gave(self, gave: Gave, region: Region | None) -> None:
        if not self.flights or self.flights[0].number != gave.number:
            raise StageFailed(f"answer {gave.number} was not asked for")
        flight = self.flights[0]
        if not gave.more:
            self.flights.popleft()
            self.served += 1
        memory = (region or self.arena.region).memory
        try:
            self._boss.gave(self, flight, gave, memory)
        finally:
            if not gave.more and self.state != "ended":
                self.arena.release(flight.slot)

    def _opened(self, report: Opened) -> None:
        if report.signature != self.blueprint.signature:
            self.kill(f"opened with signature {report.signature}, planned {self.blueprint.signature}")
            return
        self._timer.cancel()
        self.resident = report.resident
        if self.state == "opening":
            self.state = "ready"
            self._boss.opened(self)

    def ping(self, number: int) -> None:
        """Ask for a sign of life; `heard` tells when the last one came."""
        try:
            send(self._sock, encode(Ping(number)))
        except OSError:
            pass

    def stop(self, *, grace: float = 5.0) -> None:
        """Let it finish what it holds, close its stage and leave; kill it after `grace` seconds."""
        if self.state in ("stopping", "ended"):
            return
        self.state = "stopping"
        self._timer.cancel()
        try:
            send(self._sock, encode(Stop()))
        except OSError:
            pass
        self._timer = self._loop.call_later(grace, self.kill, f"did not stop within {grace:g} s")

    def kill(self, reason: str) -> None:
        """End it now. What it held goes back to the station when the kernel reports the end."""
        if self.state == "ended":
            return
        self._reason = self._reason or reason
        self.state = "stopping"
        try:
            os.killpg(self._child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def _late(self) -> None:
        self.kill(f"did not open within {self.blueprint.open_timeout:g} s")

    def _end(self) -> None:
        """The process is gone: read what it had still to say, give everything back, tell the station."""
        self._loop.remove_reader(self._pid)
        for _ in range(self.blueprint.depth + 64):  # what it said before it died counts
            if self._deaf:
                break
            self._hear()
        self._loop.remove_reader(self._sock.fileno())
        self._read_log()
        self._loop.remove_reader(self._log)
        wanted = self.state == "stopping" and not self._reason
        self.state = "ended"
        self._timer.cancel()
        process.stop(self._child)
        for fd in (self._pid, self._log):
            os.close(fd)
        self._sock.close()
        self.arena.close()
        flights, self.flights = list(self.flights), deque()
        self._boss.ended(self, flights, "" if wanted else self._why())
        self.ended.set_result(None)

    def _why(self) -> str:
        """The reason, the way it ended, and its last lines, as one text."""
        end = process.describe_exit(self._child.returncode)
        text = f"{self._reason} ({end})" if self._reason else end
        return text if not self._tail.lines else f"{text}; its last lines: {' | '.join(list(self._tail.lines)[-5:])}"

    def _read_log(self) -> None:
        tail = self._tail
        for _ in range(16):  # a worker that prints without end must not stop the host
            try:
                data = os.read(self._log, 2**16)
            except BlockingIOError:
                return
            if not data:
                self._loop.remove_reader(self._log)
                return
            *lines, tail.rest = (tail.rest + data).split(b"\n")
            if len(tail.rest) > _LINE:
                lines, tail.rest = [*lines, tail.rest], b""
            for line in lines:
                text = line[:_LINE].decode(errors="replace").rstrip()
                tail.lines.append(text)
                self._boss.said(self, text)
