"""The worker: a child process that opens one stage and then takes a batch, runs it, and passes the answer on."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from torchship import hardware
from torchship.artifact import Store
from torchship.errors import TorchshipError
from torchship.pipeline.config import StageConfig
from torchship.pipeline.opening import open_stage
from torchship.pipeline.rows import check_outputs, check_rows
from torchship.process import resolve
from torchship.serve.engine.ipc import arena
from torchship.serve.engine.ipc.arena import Arena, Block, Region
from torchship.serve.engine.ipc.signals import (
    Call,
    Fault,
    Gave,
    Inbox,
    Opened,
    Piece,
    Ping,
    Pong,
    Refused,
    Stop,
    Take,
    decode_order,
    describe,
    encode,
    send,
)
from torchship.stage import Stage
from torchship.tensors import Array, Tensors, numpy_dtype

_PATIENCE = 150_000  # nanoseconds; who has one quick caller looks for the next request so long before it sleeps
_CORES = hardware.cores()


class Post(msgspec.Struct, frozen=True):
    """What a worker is told when it starts: its descriptors, the arena's measures, and how to open its stage.

    `opener` is `module:function`; it is called with `stage` and returns a Stage. `private`: the stage may keep or
    change what it is given, so it gets copies instead of views.
    """

    sock: int
    memory: int
    depth: int
    input_size: int
    output_size: int
    opener: str
    stage: Any
    private: bool = True
    warm: bool = False
    nice: int = 0


def main(argument: Any) -> None:
    """The child's entry point: returns when the host says stop or goes away."""
    post = msgspec.convert(argument, Post)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: the host decides
    os.nice(post.nice)
    sock = socket.socket(fileno=post.sock)
    sock.setblocking(True)
    memory = Arena(Region.take(post.memory), depth=post.depth, input_size=post.input_size, output_size=post.output_size)
    began = time.monotonic()
    try:
        stage: Stage = resolve(post.opener)(post.stage)
        if post.warm:
            _warm(stage)
    except Exception as fault:
        import traceback

        traceback.print_exc()
        send(sock, encode(Refused(describe(fault))))
        return
    send(sock, encode(Opened(str(stage.signature), time.monotonic() - began, _resident())))
    Bench(stage, arena=memory, sock=sock, private=post.private).work()
    stage.close()


def _warm(stage: Stage) -> None:
    """Run once on zeros, so that the first caller does not pay for lazy loading; what it says is of no interest."""
    tensors = {}
    for spec in stage.signature.inputs:
        shape = [axis if isinstance(axis, int) else axis.min for axis in spec.shape]
        fill: Any = b"" if spec.dtype == "BYTES" else 0
        tensors[spec.name] = np.full(shape, fill, numpy_dtype(spec.dtype))
    stage(tensors)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Bench:
    """One stage, the arena and the socket; `work` is the loop."""

    def __init__(self, stage: Stage, *, arena: Arena, sock: socket.socket, private: bool) -> None:
        self._stage = stage
        self._arena = arena
        self._sock = sock
        self._private = private
        signature = stage.signature
        self._inputs = [(spec.name, numpy_dtype(spec.dtype)) for spec in signature.inputs]
        self._batched = signature.batched
        self._lost = ""
        self._patience = 0

    def work(self) -> None:
        """Take, run, pass on, until the host stops us or is gone. Raises SystemExit when the device is lost."""
        inbox = Inbox(self._sock)
        while not self._lost:
            try:
                message, fd = inbox.next(patience=self._patience)
            except (ConnectionError, InterruptedError):
                return
            if not message:
                return
            order = decode_order(message)
            if isinstance(order, Take):
                self._take(order, fd)
            elif isinstance(order, Ping):
                send(self._sock, encode(Pong(order.number, _resident())))
            elif isinstance(order, Stop):
                return
        raise SystemExit(self._lost)

    def _take(self, take: Take, fd: int) -> None:
        region = self._arena.region if fd < 0 else Region.take(fd)
        began = time.monotonic_ns()
        try:
            if take.calls and take.calls[0].stream:
                self._stream(take, region, began)
                return
            answers, faults = self._run(take.calls, region)
            ended = time.monotonic_ns()
            alone = len(take.calls) == 1 and len(take.calls[0].rows) == 1
            self._patience = _PATIENCE if alone and ended - began < _PATIENCE and _CORES > 1 else 0
            self._pass(take, answers, faults, began=began, ended=ended)
        finally:
            if fd >= 0:
                region.close()

    def _run(
        self, calls: Sequence[Call], region: Region
    ) -> tuple[list[tuple[int, list[int], list[Array]]], list[Fault]]:
        """The answers as (first job, rows of each job, outputs), and the faults."""
        company = sum(len(call.rows) for call in calls) > 1
        answers: list[tuple[int, list[int], list[Array]]] = []
        faults: list[Fault] = []
        first = 0
        for call in calls:
            tensors = self._tensors(call, region)
            try:
                answers.append((first, *self._call(tensors, call.values, call.rows)))
            except Exception as fault:
                self._check_device(fault, company=company)
                if len(call.rows) == 1:
                    self._blame(fault)
                    faults.append(describe(fault, job=first))
                else:
                    self._singly(tensors, call, first, answers, faults)
            first += len(call.rows)
        return answers, faults

    def _singly(
        self,
        tensors: Tensors,
        call: Call,
        first: int,
        answers: list[tuple[int, list[int], list[Array]]],
        faults: list[Fault],
    ) -> None:
        """Once more, job by job, so that one bad input does not fail its neighbours."""
        at = 0
        for index, rows in enumerate(call.rows):
            own = {name: array[at : at + rows] for name, array in tensors.items()}
            at += rows
            try:
                answers.append((first + index, *self._call(own, call.values, [rows])))
            except Exception as fault:
                self._check_device(fault, company=True)
                self._blame(fault)
                faults.append(describe(fault, job=first + index))

    def _check_device(self, fault: Exception, *, company: bool) -> None:
        """After a CUDA error nothing works in this process any more: it ends. In company it ends without an answer, so
        that the host runs each of these jobs by itself in a fresh process and only the guilty one fails."""
        if "CUDA error" not in str(fault):
            return
        self._lost = f"this process ends after a {str(fault).splitlines()[0]}"
        if company:
            self._blame(fault)
            raise SystemExit(self._lost)

    def _blame(self, fault: Exception) -> None:
        """The log gets the traceback of what is no fault of the caller."""
        if isinstance(fault, TorchshipError):
            return
        import traceback

        traceback.print_exception(fault)

    def _tensors(self, call: Call, region: Region) -> Tensors:
        tensors = {}
        for (name, dtype), block in zip(self._inputs, call.blocks, strict=True):
            array = arena.read(block, dtype=dtype, memory=region.memory)
            tensors[name] = array.copy() if self._private and not dtype.hasobject else array
        return tensors

    def _call(self, tensors: Tensors, values: Mapping[str, Any], rows: list[int]) -> tuple[list[int], list[Array]]:
        answer = self._stage(tensors, values) if values else self._stage(tensors)
        if self._batched:
            check_rows(answer, sum(rows))
        return rows, self._checked(answer)

    def _checked(self, answer: Tensors) -> list[Array]:
        """The outputs in their order, of the declared datatype."""
        return list(check_outputs(self._stage.signature, answer).values())

    def _stream(self, take: Take, region: Region, began: int) -> None:
        """Each answer of a generator is sent as soon as it is there, in memory of its own."""
        call = take.calls[0]
        try:
            for answer in self._answers(self._tensors(call, region), call.values):
                outputs = self._checked(answer)
                self._pass(take, [(0, call.rows, outputs)], [], began=began, ended=time.monotonic_ns(), more=True)
        except Exception as fault:
            self._check_device(fault, company=False)
            self._blame(fault)
            self._pass(take, [], [describe(fault)], began=began, ended=time.monotonic_ns())
            return
        self._pass(take, [], [], began=began, ended=time.monotonic_ns())

    def _answers(self, tensors: Tensors, values: Mapping[str, Any]) -> Iterator[Tensors]:
        stream = getattr(self._stage, "stream", None)
        if stream is None:
            yield self._stage(tensors, values)
        else:
            yield from stream(tensors, values)

    def _pass(
        self,
        take: Take,
        answers: Sequence[tuple[int, list[int], list[Array]]],
        faults: list[Fault],
        *,
        began: int,
        ended: int,
        more: bool = False,
    ) -> None:
        """Write the outputs into the slot, or into memory of their own when they do not fit, and tell the host."""
        start, end = self._arena.output_span(take.slot)
        need = sum(arena.aligned(arena.size_of(array)) for _, _, outputs in answers for array in outputs)
        if need <= end - start and not more:
            pieces = _place(answers, self._arena.region.memory, start)
            send(self._sock, encode(Gave(take.number, began, ended, pieces, faults)))
            return
        if not need:
            pieces = _place(answers, memoryview(bytearray(0)), 0)
            send(self._sock, encode(Gave(take.number, began, ended, pieces, faults, more)))
            return
        region = Region.make(need)
        try:
            pieces = _place(answers, region.memory, 0)
            send(self._sock, encode(Gave(take.number, began, ended, pieces, faults, more)), fd=region.fd)
        finally:
            region.close()


def _place(answers: Sequence[tuple[int, list[int], list[Array]]], memory: memoryview, offset: int) -> list[Piece]:
    pieces = []
    for first, rows, outputs in answers:
        blocks: list[Block] = []
        for array in outputs:
            block = arena.write([array], memory=memory, offset=offset)
            blocks.append(block)
            offset += arena.aligned(block.size)
        pieces.append(Piece(first, rows, blocks))
    return pieces


class Kit(msgspec.Struct, frozen=True):
    """A stage of a pipeline and the store that its artifact is in."""

    config: StageConfig
    store: str


def open_configured(argument: Any) -> Stage:
    """The opener of pipelines: what `Kit` describes, as a Stage."""
    kit = msgspec.convert(argument, Kit)
    return open_stage(kit.config, Store(kit.store))
