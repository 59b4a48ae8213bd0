"""Replicas: a copy of a stage as its station sees it, and the kind that runs on this machine."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeAlias

import msgspec
import numpy as np

from torchship.errors import StageFailed, TorchshipError, Unavailable
from torchship.pipeline.faults import revive
from torchship.serve.engine.ipc import arena, messages
from torchship.serve.engine.ipc.arena import Arena, ArenaBlock
from torchship.serve.engine.ipc.messages import BatchDone, CardMemory, RunBatch, decode_report, encode
from torchship.serve.engine.launch import Launch, WorkerProcess
from torchship.serve.engine.queue import StageCall
from torchship.serve.engine.spec import WorkerSpec
from torchship.serve.ipc.memory import MemoryRegion
from torchship.serve.ipc.packets import INLINE, Inbox, send
from torchship.tensors import Array, numpy_dtype

_log = logging.getLogger("torchship.serve")
_RAW = {tuple}
_CROWDED = 0.25  # seconds; less waiting for a processor is no excuse for opening late


class InFlightBatch(msgspec.Struct, eq=False):
    """A batch that a replica holds. `unread` are the answers of a stream that its caller has not taken yet."""

    number: int
    slot: int
    calls: list[StageCall]
    sent: float
    stream: bool = False
    unread: int = 0


class ReplicaEvents(Protocol):
    """What a replica reports to: its station."""

    def on_open(self, replica: Replica) -> None:
        """The replica is ready for its first batch."""

    def on_result(self, replica: Replica, batch: InFlightBatch, done: BatchDone, outputs: list[list[Array]]) -> None:
        """An answer came; `outputs[i]` are the arrays of `done.results[i]`."""

    def on_end(self, replica: Replica, batches: list[InFlightBatch], reason: str) -> None:
        """The replica is gone, and with it what it held, oldest first."""

    def on_log(self, replica: Replica, line: str) -> None:
        """The replica printed a line."""


class Replica(Protocol):
    """One copy of a stage, wherever it runs. `state` goes from opening to ready to stopping to ended, never back.

    Batches come back in the order in which they were given. `heard` is when it last gave a sign of life, `served` how
    many batches it has answered, `fault` why its stage could not be opened, `killed` when it was killed (0: never);
    `ended` is done when it is gone. It takes `slots` batches altogether, and has reserved `shared` bytes of memory to
    hand them over; `pid` is its process id, for logs, or 0 where it has none. `card` is the memory of the card that it
    has opened its stage on, if any.
    """

    spec: WorkerSpec
    pid: int
    slots: int
    shared: int
    state: str
    in_flight: deque[InFlightBatch]
    heard: float
    served: int
    killed: float
    fault: TorchshipError | None
    card: CardMemory | None
    ended: asyncio.Future[None]

    @property
    def room(self) -> int:
        """How many more batches it takes now."""

    @property
    def size(self) -> int:
        """Its resident memory in bytes; 0 where that is not known."""

    def give(self, calls: list[StageCall], *, now: float) -> None:
        """Take a batch on. Ask `room` first. Raises TorchshipError where it cannot be handed over."""

    def taken(self, batch: InFlightBatch) -> None:
        """The caller of a stream has taken an answer: the replica may go on to make more."""

    def drop(self, batch: InFlightBatch) -> None:
        """Nobody waits for the rest of a stream: end it at its next step."""

    def ping(self, number: int) -> None:
        """Ask for a sign of life."""

    def stop(self, *, grace: float = 5.0) -> None:
        """Let it finish what it holds and leave; end it after `grace` seconds."""

    def kill(self, reason: str) -> None:
        """End it now."""


StartReplica: TypeAlias = Callable[[WorkerSpec, ReplicaEvents], Replica]


class LocalReplica:
    """A Replica on this machine, with which it shares memory; Replica says what its methods do."""

    def __init__(self, spec: WorkerSpec, events: ReplicaEvents, *, launch: Launch = WorkerProcess) -> None:
        """Starts the worker by `launch`: a process, or a thread of this one.

        Raises Unavailable when memory, processes or descriptors have run out.
        """
        self.spec, self.slots = spec, spec.depth
        self.state = "opening"
        self.in_flight: deque[InFlightBatch] = deque()
        self.heard = time.monotonic()
        self.fault: TorchshipError | None = None
        self.card: CardMemory | None = None
        self.served, self.killed = 0, 0.0
        self._reason = ""
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._number = 0
        self._waited = 0.0
        self._deaf = False
        signature = spec.model.signature
        self._fits, self._batched = spec.model.fits, signature.batched
        self._raw_inputs = [(numpy_dtype(given.dtype), tuple(given.wire_shape[1:])) for given in signature.inputs]
        self._outputs = [numpy_dtype(given.dtype) for given in signature.outputs]
        self._start(launch)
        self._timer = self._loop.call_later(spec.open_timeout, self._late)
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def _start(self, launch: Launch) -> None:
        spec, model = self.spec, self.spec.model
        try:
            input_size, output_size = model.slot_sizes
            self._arena = Arena.make(depth=spec.depth, input_size=input_size, output_size=output_size)
            try:
                self._worker = launch(spec, self._arena, partial(self._events.on_log, self), self._end)
            except BaseException:
                self._arena.region.close()
                raise
        except OSError as fault:
            raise Unavailable(f"cannot start a worker for {model.name!r}: {fault}") from None
        self.pid, self.shared, self._sock = self._worker.pid, self._arena.region.size, self._worker.sock
        self._arena.region.drop_descriptor()
        self._inbox = Inbox(self._sock)
        self._sock.setblocking(False)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * INLINE)
        self._loop.add_reader(self._sock.fileno(), self._hear)

    @property
    def size(self) -> int:
        return self._worker.size

    @property
    def room(self) -> int:
        return len(self._arena.free) if self.state == "ready" else 0

    def give(self, calls: list[StageCall], *, now: float) -> None:
        slot = self._arena.free.pop()
        self._number += 1
        region = None
        try:
            packed, region = self._pack(calls, slot)
            send(self._sock, encode(RunBatch(self._number, slot, packed)), fd=region.fd if region else -1)
        except ConnectionError:  # it died a moment ago: its end is on the way and takes the batch with it
            pass
        except Exception as fault:
            self._arena.free.append(slot)
            if isinstance(fault, TorchshipError):
                raise
            raise Unavailable(f"a batch cannot be handed to a worker: {type(fault).__name__}: {fault}") from fault
        finally:
            if region:
                region.close()
        self.in_flight.append(InFlightBatch(self._number, slot, calls, now, calls[0].part is not None))

    def _pack(self, calls: list[StageCall], slot: int) -> tuple[list[messages.PackedCall], MemoryRegion | None]:
        start, end = self._arena.input_span(slot)
        need = 0
        if not self._fits:  # each tensor begins where it may
            need = arena.ALIGN * len(calls[0].arrays) * (1 if self._batched else len(calls))
            need += sum([arena.size_of(one) for call in calls for one in call.arrays if one is not None])
        region = None if need <= end - start else MemoryRegion.make(need)
        memory, at = (region.memory, 0) if region else (self._arena.region.memory, start)
        groups = [calls] if self._batched else [[call] for call in calls]
        packed = []
        for group in groups:
            rows = [call.rows for call in group]
            columns = zip(*[call.arrays for call in group], strict=True)
            kinds = {type(call.arrays) for call in group}
            blocks: list[ArenaBlock | None] = []
            for index, column in enumerate(columns):
                if column[0] is None:  # an optional input: calls share a batch only where none of them has it
                    blocks.append(None)
                    continue
                if kinds == _RAW:
                    shape = (sum(rows), *self._raw_inputs[index][1])
                    block = arena.write_raw(column, memory=memory, offset=at, shape=shape)
                else:
                    arrays = column if tuple not in kinds else self._arrays(column, index)
                    block = arena.write(arrays, memory=memory, offset=at)
                blocks.append(block)
                at = arena.aligned(at + block.size)
            head = group[0]
            packed.append(messages.PackedCall(rows, blocks, head.values, head.part is not None))
        return packed, region

    def _arrays(self, column: Sequence[Any], index: int) -> list[Array]:
        """Rows of which some are bytes, as arrays."""
        dtype, axes = self._raw_inputs[index]
        return [np.frombuffer(one, dtype).reshape(-1, *axes) if type(one) is bytes else one for one in column]

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
        except Exception as fault:  # whatever it sent, the host goes on
            self.kill(f"broke the line's protocol: {fault}")
            return
        self._deaf = True  # it died: the kernel reports the end in a moment
        self._loop.remove_reader(self._sock.fileno())

    def _report(self, message: memoryview, fd: int) -> None:
        region = MemoryRegion.take(fd) if fd >= 0 else None
        try:
            report = decode_report(message)
            self.heard = time.monotonic()
            if isinstance(report, BatchDone):
                self._on_done(report, region)
            elif isinstance(report, messages.Opened):
                planned = str(self.spec.model.signature)
                if report.signature != planned:
                    self.kill(f"opened with signature {report.signature}, planned {planned}")
                elif self.state == "opening":
                    self._timer.cancel()
                    self.state, self.card = "ready", report.card
                    self._events.on_open(self)
            elif isinstance(report, messages.OpenFailed):
                self.fault = revive(report.fault, stage=self.spec.model.name)
        finally:
            if region:
                region.close()

    def _on_done(self, done: BatchDone, region: MemoryRegion | None) -> None:
        if not self.in_flight or self.in_flight[0].number != done.number:
            raise StageFailed(f"answer {done.number} was not asked for")
        batch = self.in_flight[0]
        outputs = [self._read(result.blocks, (region or self._arena.region).memory) for result in done.results]
        if not done.more:
            self.in_flight.popleft()
            self.served += 1
            self._arena.free.append(batch.slot)
        self._events.on_result(self, batch, done, outputs)

    def _read(self, blocks: Sequence[ArenaBlock], memory: memoryview) -> list[Array]:
        arrays: list[Array] = []
        for block, dtype in zip(blocks, self._outputs, strict=True):
            array = arena.read(block, dtype=dtype, memory=memory)
            arrays.append(array if dtype.hasobject else array.copy())
        return arrays

    def _tell(self, order: messages.Order) -> None:
        """Send what needs no answer; a worker that is gone is noticed elsewhere."""
        with suppress(OSError):
            send(self._sock, encode(order))

    def taken(self, batch: InFlightBatch) -> None:
        batch.unread -= 1
        self.heard = time.monotonic()  # it waited for its caller: that is no hang
        self._tell(messages.Taken(batch.number))

    def drop(self, batch: InFlightBatch) -> None:
        self._tell(messages.Drop(batch.number))

    def ping(self, number: int) -> None:
        self._tell(messages.Ping(number))

    def stop(self, *, grace: float = 5.0) -> None:
        if self.state in ("stopping", "ended"):
            return
        self.state = "stopping"
        self._timer.cancel()
        self._tell(messages.Stop())
        self._timer = self._loop.call_later(grace, self.kill, f"did not stop within {grace:g} s")

    def kill(self, reason: str) -> None:
        if self.state == "ended":
            return
        self._reason, self.killed = self._reason or reason, self.killed or time.monotonic()
        self.state = "stopping"
        self._worker.kill()

    def _late(self) -> None:
        """Its time is over, but for what it spent waiting for a processor: on a crowded machine that is not its own."""
        waited = self._worker.waited
        if waited - self._waited > _CROWDED:
            self._timer = self._loop.call_later(waited - self._waited, self._late)
            self._waited = waited
        else:
            self.kill(f"did not open within {self.spec.open_timeout:g} s")

    def _end(self) -> None:
        """The worker is gone: read what it had still to say, give everything back, tell the station."""
        self._worker.unwatch()
        for _ in range(self.spec.depth + 64):  # what it said before it died counts
            if self._deaf:
                break
            self._hear()
        self._loop.remove_reader(self._sock.fileno())
        wanted = self.state == "stopping" and not self._reason
        self.state = "ended"
        self._timer.cancel()
        how = self._worker.release()
        self._arena.region.close()
        batches, self.in_flight = list(self.in_flight), deque()
        self._events.on_end(self, batches, "" if wanted else self._why(how))
        self.ended.set_result(None)

    def _why(self, end: str) -> str:
        """The reason and the way it ended, for callers too; its last lines may hold others' data: they are logged."""
        text = f"{self._reason} ({end})" if self._reason else end
        if lines := self._worker.last_lines:
            _log.warning("worker %d %s; its last lines: %s", self.pid, text, " | ".join(lines), extra={"pid": self.pid})
        return text
