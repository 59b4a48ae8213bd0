"""The worker: a child process that opens one stage and then takes a batch, runs it, and passes the answer on."""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import msgspec
import numpy as np

from torchship import hardware
from torchship.artifact import Store
from torchship.errors import TorchshipError
from torchship.pipeline.faults import Fault, describe, is_device_lost, words_of
from torchship.pipeline.opening import open_stage
from torchship.pipeline.rows import check_outputs, check_rows
from torchship.pipeline.wiring import relax
from torchship.serve.engine.ipc import arena, messages
from torchship.serve.engine.ipc.arena import Arena, ArenaBlock
from torchship.serve.engine.ipc.messages import BatchDone, Order, RunBatch, encode
from torchship.serve.engine.spec import WorkerSpec
from torchship.serve.ipc.memory import MemoryRegion
from torchship.serve.ipc.packets import Inbox, send
from torchship.stage import Stage, Value
from torchship.tensors import Array, Signature, Tensors, numpy_dtype

_PATIENCE = 150_000  # nanoseconds of a process that has a core of its own
_CORES = hardware.cores()
_AHEAD = 16  # answers of a stream that its caller has not taken yet
_AHEAD_BYTES = 2**22
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def main(argument: Any, sock: socket.socket, *, threaded: bool = False) -> None:
    """The worker's entry point: returns when the host, at the other end of `sock`, says stop or goes away.

    `argument` is the descriptor of its arena, and its WorkerSpec. `threaded`: it is a thread of the host.
    """
    fd, spec = msgspec.convert(argument, tuple[int, WorkerSpec])
    for number in () if threaded else _SIGNALS:  # they go to whole groups: the host alone decides
        signal.signal(number, lambda *_: None)  # a function, since what is ignored stays so in the stage's children
    os.nice(spec.placement.nice)
    sizes = dict(zip(("input_size", "output_size"), spec.model.slot_sizes, strict=True))
    memory = Arena(MemoryRegion.take(fd), depth=spec.depth, **sizes)
    try:
        _serve(spec, memory, sock, patience=0 if threaded else _PATIENCE)
    finally:
        memory.region.close()


def _serve(spec: WorkerSpec, memory: Arena, sock: socket.socket, *, patience: int) -> None:
    """Open the stage, tell the host, and work until the end."""
    model = spec.model
    try:
        stage = open_stage_of(spec)
        if model.config.artifact:
            _warm(stage)
        hardware.give_memory_back()  # opening takes more than serving does
    except BaseException as fault:
        _print(fault)
        send(sock, encode(messages.OpenFailed(describe(fault))))
        return
    if (register := getattr(stage, "register", None)) is not None:
        register(np.frombuffer(memory.region.memory, np.uint8).ctypes.data, len(memory.region.memory))
    signature = stage.signature.taking([spec.name for spec in model.signature.inputs])
    measure = getattr(stage, "card_memory", None)
    card = messages.CardMemory(*measure()) if measure is not None else None
    send(sock, encode(messages.Opened(str(relax(signature)), card)))
    runner, private = StageRunner(stage, signature), bool(model.config.run)
    WorkerLoop(runner, arena=memory, sock=sock, private=private, patience=patience).work()
    stage.close()


def open_stage_of(spec: WorkerSpec) -> Stage:
    """The stage that a specification describes, on the device of its placement."""
    config = msgspec.structs.replace(spec.model.config, device=spec.placement.device)
    return open_stage(config, Store(spec.model.store))


def _warm(stage: Stage) -> None:
    """Run once on zeros, so that the first caller does not pay for lazy loading; what it says is of no interest."""
    tensors = {}
    for spec in stage.signature.inputs:
        shape = [axis if isinstance(axis, int) else axis.min for axis in spec.shape]
        fill: Any = b"" if spec.dtype == "BYTES" else 0
        tensors[spec.name] = np.full(shape, fill, numpy_dtype(spec.dtype))
    stage(tensors)


def _print(fault: BaseException) -> None:
    """The log gets the traceback of what is no fault of the caller."""
    if isinstance(fault, TorchshipError):
        return
    try:
        traceback.print_exception(fault)
    except Exception:  # it may be as odd as its message
        print(f"{type(fault).__name__}: {words_of(fault)}", flush=True)


class Answer(NamedTuple):
    """What one call gave: the first of its jobs, the rows of each, and the outputs in their order."""

    first: int
    rows: list[int]
    outputs: list[Array]


class StageRunner:
    """Runs calls of one stage. Whatever it raises, SystemExit too, is the fault of the job that it was called for."""

    def __init__(self, stage: Stage, signature: Signature | None = None) -> None:
        """`signature` is the stage's own, or without the optional inputs that no call brings."""
        self.signature = signature or stage.signature
        self.lost = ""
        self._stage = stage

    def run(
        self, calls: Sequence[tuple[Tensors, Mapping[str, Value], list[int]]], *, first: int = 0, company: bool = False
    ) -> tuple[list[Answer], list[Fault]]:
        """The answers and the faults of calls, each given as its tensors, its values and the rows of its jobs.

        Jobs that share a call that fails run once more, one by one, so that a bad input does not fail its neighbours.
        `first` is the number of the first job; `company`: there are other jobs. Raises SystemExit when the device is
        lost with more than one job on it.
        """
        company = company or sum(len(rows) for _, _, rows in calls) > 1
        answers: list[Answer] = []
        faults: list[Fault] = []
        for tensors, values, rows in calls:
            try:
                answer = self._stage(tensors, values) if values else self._stage(tensors)
                if self.signature.batched:
                    check_rows(answer, sum(rows))
                answers.append(Answer(first, rows, list(check_outputs(self.signature, answer).values())))
            except BaseException as fault:
                self._check_device(fault, company=company)
                if len(rows) == 1:
                    _print(fault)
                    faults.append(describe(fault, job=first))
                else:
                    single = [
                        ({name: array[end - count : end] for name, array in tensors.items()}, values, [count])
                        for count, end in zip(rows, accumulate(rows), strict=True)
                    ]
                    more = self.run(single, first=first, company=True)
                    answers += more[0]
                    faults += more[1]
            first += len(rows)
        return answers, faults

    def _check_device(self, fault: BaseException, *, company: bool) -> None:
        """A process that has lost its device ends. In company it ends without an answer, so
        that the host runs each of these jobs by itself in a fresh process and only the guilty one fails."""
        text = words_of(fault)
        if not is_device_lost(text):
            return
        self.lost = f"this process ends after a {text}"
        if company:
            _print(fault)
            raise SystemExit(self.lost)

    def stream(self, tensors: Tensors, values: Mapping[str, Value]) -> Generator[Tensors]:
        """All answers of a generator, or the one answer of a function; to be run by `step` and `end`."""
        stream = getattr(self._stage, "stream", None)
        if stream is None:
            yield self._stage(tensors, values)
        else:
            yield from stream(tensors, values)

    def step(self, answers: Generator[Tensors]) -> list[Array] | Fault | None:
        """The outputs of the next answer; None after the last, and a Fault for whatever the stage raises."""
        try:
            answer = next(answers, None)
            return None if answer is None else list(check_outputs(self.signature, answer).values())
        except BaseException as fault:
            self._check_device(fault, company=False)
            _print(fault)
            return describe(fault)

    def rest(self) -> None:
        """Nothing is to be done: give back memory of a card that only a spike has needed."""
        if (trim := getattr(self._stage, "trim", None)) is not None:
            trim()

    def end(self, answers: Generator[Tensors]) -> None:
        """Close a generator; what it raises in its `finally` concerns nobody but the log."""
        try:
            answers.close()
        except BaseException as fault:
            _print(fault)


class WorkerLoop:
    """One stage, the arena and the socket; `work` is the loop."""

    def __init__(
        self, runner: StageRunner, *, arena: Arena, sock: socket.socket, private: bool, patience: int = 0
    ) -> None:
        """`private`: the stage may keep or change what it is given, so it gets copies instead of views.

        With one quick caller it looks for the next request for `patience` nanoseconds before it sleeps.
        """
        self._runner = runner
        self._arena = arena
        self._sock = sock
        self._inbox = Inbox(sock)
        self._private = private
        self._inputs = [(spec.name, numpy_dtype(spec.dtype)) for spec in runner.signature.inputs]
        self._patience, self._most_patience = 0, patience if _CORES > 1 else 0
        self._later: deque[tuple[Order, int]] = deque()
        self._dropped: set[int] = set()

    def work(self) -> None:
        """Take, run, pass on, until the host stops us or is gone. Raises SystemExit when the device is lost."""
        try:
            while not self._runner.lost:
                order, fd = self._later.popleft() if self._later else self._next(patience=self._patience)
                if isinstance(order, RunBatch):
                    self._run(order, fd)
                elif isinstance(order, messages.Stop):
                    return
                else:
                    self._answer(order)
        except ConnectionError:
            return
        raise SystemExit(self._runner.lost)

    def _next(self, *, patience: int = 0) -> tuple[Order, int]:
        message, fd = self._inbox.next(patience=patience)
        if not message:
            raise ConnectionError("the host is gone")
        return messages.decode_order(message), fd

    def _run(self, batch: RunBatch, fd: int) -> None:
        region = self._arena.region if fd < 0 else MemoryRegion.take(fd)
        began = time.monotonic_ns()
        try:
            calls = [(self._tensors(call, region), call.values, call.rows) for call in batch.calls]
            if batch.calls and batch.calls[0].stream:
                self._stream(batch, calls[0], began)
                return
            answers, faults = self._runner.run(calls)
            ended = time.monotonic_ns()
            alone = len(calls) == 1 and len(batch.calls[0].rows) == 1
            self._patience = self._most_patience if alone and ended - began < _PATIENCE else 0
            self._send(batch.number, answers, faults, times=(began, ended), slot=batch.slot)
        finally:
            if fd >= 0:
                region.close()

    def _tensors(self, call: messages.PackedCall, region: MemoryRegion) -> Tensors:
        tensors = {}
        for (name, dtype), block in zip(self._inputs, call.blocks, strict=True):
            if block is None:
                continue
            array = arena.read(block, dtype=dtype, memory=region.memory)
            tensors[name] = array.copy() if self._private and not dtype.hasobject else array
        return tensors

    def _stream(self, batch: RunBatch, call: tuple[Tensors, Mapping[str, Value], list[int]], began: int) -> None:
        """Each answer of a generator is sent as soon as it is there, in memory of its own, but never far ahead of its
        caller; the generator is closed as soon as nobody waits for it."""
        tensors, values, rows = call
        answers = self._runner.stream(tensors, values)
        ahead: deque[int] = deque()
        outputs: list[Array] | Fault | None = None
        while self._may_go_on(batch.number, ahead):
            outputs = self._runner.step(answers)
            if not isinstance(outputs, list):
                break
            ahead.append(sum(map(arena.size_of, outputs)))
            times = began, time.monotonic_ns()
            if not self._send(batch.number, [Answer(0, rows, outputs)], [], times=times, more=True):
                self._runner.end(answers)
                return
        self._runner.end(answers)
        self._dropped = {number for number in self._dropped if number > batch.number}
        faults = [outputs] if isinstance(outputs, Fault) else []
        self._send(batch.number, [], faults, times=(began, time.monotonic_ns()), slot=batch.slot)

    def _may_go_on(self, number: int, ahead: deque[int]) -> bool:
        """Whether a stream is still wanted; waits while its caller has too many answers left to take."""
        while number not in self._dropped and (
            self._inbox.waiting or len(ahead) >= _AHEAD or sum(ahead) > _AHEAD_BYTES
        ):
            order, fd = self._next()
            if isinstance(order, RunBatch | messages.Stop):
                self._later.append((order, fd))
            elif isinstance(order, messages.Taken) and order.number == number:
                ahead.popleft()
            else:
                self._answer(order)
        return number not in self._dropped

    def _answer(self, order: Order) -> None:
        """What can be done at once, whatever else is under way."""
        if isinstance(order, messages.Ping):  # the host asks whom it has not heard for seconds
            send(self._sock, encode(messages.Pong(order.number)))
            self._runner.rest()
        elif isinstance(order, messages.Drop):  # it may be of a stream that has not begun, or has ended
            self._dropped.add(order.number)

    def _send(
        self,
        number: int,
        answers: Sequence[Answer],
        faults: list[Fault],
        *,
        times: tuple[int, int],
        slot: int = -1,
        more: bool = False,
    ) -> bool:
        """Write the outputs into the slot, or into memory of their own when they do not fit, and tell the host; whether
        more may follow. Where there is no memory for them, the jobs fail instead."""
        start, end = self._arena.output_span(slot) if slot >= 0 else (0, 0)
        region = None
        if (
            need := sum(arena.aligned(arena.size_of(one)) for answer in answers for one in answer.outputs)
        ) > end - start:
            try:
                region, start = MemoryRegion.make(need), 0
            except TorchshipError as fault:
                jobs = [answer.first + place for answer in answers for place in range(len(answer.rows))]
                answers, faults, more = [], [*faults, *(describe(fault, job=job) for job in jobs)], False
        try:
            results, memory = [], (region or self._arena.region).memory
            for first, rows, outputs in answers:
                blocks: list[ArenaBlock] = []
                for array in outputs:
                    blocks.append(arena.write([array], memory=memory, offset=start))
                    start += arena.aligned(blocks[-1].size)
                results.append(messages.Result(first, rows, blocks))
            done = encode(BatchDone(number, *times, results, faults, more, bool(self._runner.lost)))
            send(self._sock, done, fd=region.fd if region else -1)
        finally:
            if region:
                region.close()
        return more
