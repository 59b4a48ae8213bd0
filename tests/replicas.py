"""A second kind of Replica, in this process: shows that a line needs no child processes, and lets tests steer it."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable

from torchship.errors import TorchshipError
from torchship.pipeline.faults import Fault, describe, revive
from torchship.serve.engine.ipc.messages import BatchDone, CardMemory, Result
from torchship.serve.engine.queue import StageCall
from torchship.serve.engine.replica import InFlightBatch, Replica, ReplicaEvents
from torchship.serve.engine.spec import WorkerSpec
from torchship.serve.engine.worker import StageRunner, open_stage_of
from torchship.tensors import Array, Tensors


class InProcessReplica:
    """Opens its stage and runs its batches here, each in a turn of the event loop of its own."""

    def __init__(self, spec: WorkerSpec, events: ReplicaEvents) -> None:
        self.spec = spec
        self.state = "opening"
        self.in_flight: deque[InFlightBatch] = deque()
        self.heard = time.monotonic()
        self.served, self.killed = 0, 0.0
        self.fault: TorchshipError | None = None
        self.card: CardMemory | None = None
        self.pid = os.getpid()
        self.slots = spec.depth
        self.size = self.shared = 0
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._number = 0
        self._reason = ""
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.call_soon(self._open)

    @property
    def room(self) -> int:
        return self.slots - len(self.in_flight) if self.state == "ready" else 0

    def _open(self) -> None:
        if self.state != "opening":
            return
        try:
            self._runner = StageRunner(open_stage_of(self.spec))
        except BaseException as fault:
            self.fault = revive(describe(fault), stage=self.spec.model.name)
            self.kill("refused")
            return
        self.state = "ready"
        self._events.on_open(self)

    def give(self, calls: list[StageCall], *, now: float) -> None:
        self._number += 1
        self.in_flight.append(InFlightBatch(self._number, 0, calls, now, calls[0].part is not None))
        self._loop.call_soon(self._run, self.in_flight[-1])

    def _run(self, batch: InFlightBatch) -> None:
        if batch not in self.in_flight:
            return
        began, rows = time.monotonic_ns(), [call.rows for call in batch.calls]
        groups = [batch.calls] if self.spec.model.signature.batched else [[call] for call in batch.calls]
        given = [(self._joined(group), group[0].values, [call.rows for call in group]) for group in groups]
        self.heard = time.monotonic()
        if batch.stream:
            answers = self._runner.stream(*given[0][:2])
            while isinstance(outputs := self._runner.step(answers), list):
                part = BatchDone(batch.number, began, time.monotonic_ns(), [Result(0, rows, [])], [], True)
                self._events.on_result(self, batch, part, [outputs])
            self._done(batch, began, [], [outputs] if outputs else [], [])
            return
        found, faults = self._runner.run(given)
        results = [Result(answer.first, answer.rows, []) for answer in found]
        self._done(batch, began, results, faults, [answer.outputs for answer in found])

    def _joined(self, calls: list[StageCall]) -> Tensors:
        import numpy as np

        specs = self.spec.model.signature.inputs
        columns = zip(*[call.arrays for call in calls], strict=True)
        joined = zip(specs, columns, strict=True)
        return {spec.name: np.concatenate(column) for spec, column in joined if column[0] is not None}

    def _done(
        self, batch: InFlightBatch, began: int, results: list[Result], faults: list[Fault], outputs: list[list[Array]]
    ) -> None:
        self.in_flight.remove(batch)
        self.served += 1
        done = BatchDone(batch.number, began, time.monotonic_ns(), results, faults)
        self._events.on_result(self, batch, done, outputs)

    def taken(self, batch: InFlightBatch) -> None:
        batch.unread -= 1

    def drop(self, batch: InFlightBatch) -> None:
        pass

    def ping(self, number: int) -> None:
        self.heard = time.monotonic()

    def stop(self, *, grace: float = 5.0) -> None:
        if self.state in ("opening", "ready"):
            self.state = "stopping"
            self._loop.call_soon(self._end)

    def kill(self, reason: str) -> None:
        if self.state != "ended":
            self._reason = self._reason or reason
            self.state = "stopping"
            self._loop.call_soon(self._end)

    def _end(self) -> None:
        if self.state == "ended":
            return
        self.state = "ended"
        held, self.in_flight = list(self.in_flight), deque()
        self._events.on_end(self, held, self._reason)
        self.ended.set_result(None)


class Steered(InProcessReplica):
    """One that runs a batch only when a test says so."""

    def give(self, calls: list[StageCall], *, now: float) -> None:
        self._number += 1
        self.in_flight.append(InFlightBatch(self._number, 0, calls, now, calls[0].part is not None))

    def go(self) -> None:
        """Run the oldest batch."""
        self._run(self.in_flight[0])


def conforms(start: Callable[[WorkerSpec, ReplicaEvents], Replica]) -> None:
    """For the type checker: whatever is given here is a Replica."""


conforms(InProcessReplica)
