"""A Line: a pipeline's stations in worker processes; jobs go from one to the next and home; faults go straight home.

Rows wait as the arrays that came in, are written once into the shared memory of the worker that takes them, and the
answers are read from there. Law: `Line(plan)(x) == Composed(plan)(x)`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from torchship.artifact import Store
from torchship.errors import Cancelled, Expired, TorchshipError, Unavailable, Unsupported
from torchship.pipeline import rows as pipeline_rows
from torchship.pipeline.composed import take
from torchship.pipeline.planning import Node, Plan
from torchship.serve.arena import size_of_rows
from torchship.serve.crew import Blueprint
from torchship.serve.dispatch import Door, Job, Visit
from torchship.serve.edge import Edge, size_of
from torchship.serve.metrics import LineMeter
from torchship.serve.station import Crew, Station
from torchship.serve.worker import Kit
from torchship.stage import Parameters, Value, select
from torchship.tensors import Array, NanPolicy, Tensors

_SWEEP = 0.01  # seconds between two looks at deadlines and hangs
_SLOT_LIMIT = 2**28  # bytes; a bigger batch travels in memory of its own
_SLOT_FREE = 2**20  # bytes of a slot for each tensor whose size is not known


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a line takes: rows and bytes waiting and running, seconds from arrival to answer, and its crews."""

    queue_rows: int = 4096
    queue_bytes: int = 2**28
    timeout: float = 60.0
    max_timeout: float = 3600.0
    max_wait: float = 0.0
    depth: int = 2
    run_timeout: float = 60.0
    open_timeout: float = 120.0
    nan: NanPolicy = "allow"


@dataclass(slots=True, eq=False)
class Leg:
    """A node with its station: the slots it takes and gives, and the legs that wait for it."""

    node: Node
    station: Station
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    defaults: dict[str, Value]
    loose: tuple[int, ...]
    followers: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Gather:
    """A visit that was cut into chunks, because it has more rows than a batch."""

    leg: Leg
    parts: list[list[Array] | None]
    left: int


class Line:
    """One version of one model, running. Everything but `open`, `drain` and `close` is synchronous."""

    def __init__(self, plan: Plan, *, store: Store | None = None, limits: Limits | None = None) -> None:
        """Lays the line out; `open` starts the processes."""
        self.plan = plan
        self.limits = limits or Limits()
        self.edge = Edge(plan.signature, parameters=plan.parameters, nan=self.limits.nan)
        self.door = Door(max_rows=self.limits.queue_rows, max_bytes=self.limits.queue_bytes)
        self.meter = LineMeter()
        self.state = "opening"
        self.legs: list[Leg] = []
        self._store = store or Store()
        self._inputs = [(spec.name, key) for spec, key in zip(plan.signature.inputs, plan.inputs, strict=True)]
        self._outputs = [(spec.name, key) for spec, key in zip(plan.signature.outputs, plan.outputs, strict=True)]
        self._loop = asyncio.get_running_loop()
        self._sweeper: asyncio.TimerHandle | None = None
        self._pinger: asyncio.TimerHandle | None = None
        self._pings = 0
        self._empty: asyncio.Event = asyncio.Event()

    async def open(self) -> Line:
        """Start all workers and wait until they are ready. Raises what a stage raised when it was opened."""
        for node in self.plan.nodes:
            self.legs.append(self._leg(node))
        for leg in self.legs:
            for index in leg.node.after:
                self.legs[index].followers.append(leg.node.index)
                self.legs[index].station.after.append(leg.station)
                leg.station.before.append(self.legs[index].station)
        opening = [asyncio.ensure_future(leg.station.open()) for leg in self.legs]
        try:
            await asyncio.gather(*opening)
        except BaseException:
            for task in opening:
                task.cancel()
            await asyncio.gather(*opening, return_exceptions=True)
            await self.close(grace=0.5)
            raise
        self.state = "open"
        self._ping()
        return self

    def _leg(self, node: Node) -> Leg:
        config, signature, limits = node.config, node.signature, self.limits
        sizes = [
            min(_SLOT_LIMIT, size_of_rows(specs, rows=node.max_batch, batched=signature.batched, free=_SLOT_FREE))
            for specs in (signature.inputs, signature.outputs)
        ]
        blueprint = Blueprint(
            name=node.name,
            opener="torchship.serve.worker:open_configured",
            stage=Kit(config, str(self._store.root)),
            signature=str(signature),
            batched=signature.batched,
            depth=limits.depth,
            input_size=sizes[0],
            output_size=sizes[1],
            private=bool(config.run),
            warm=bool(config.artifact),
            threads=config.threads or (1 if config.run else None),
            open_timeout=limits.open_timeout,
        )
        crew = Crew(copies=config.copies, run_timeout=limits.run_timeout, max_wait=limits.max_wait)
        station = Station(blueprint, signature=signature, max_batch=node.max_batch, crew=crew, fail=self._fail_visit)
        loose = tuple(
            index
            for index, spec in enumerate(signature.inputs)
            if not all(isinstance(axis, int) for axis in spec.shape[1:])
        )
        defaults = select(node.parameters, {}, node.defaults)
        return Leg(node, station, node.takes, node.gives, defaults, loose)

    @property
    def ready(self) -> bool:
        """Whether every station has a worker that can take a batch."""
        return self.state == "open" and all(leg.station.ready for leg in self.legs)

    @property
    def reason(self) -> str:
        """Why the line is not ready; empty when it is."""
        if self.state != "open":
            return self.state
        broken = [str(leg.station.broken) for leg in self.legs if leg.station.broken]
        waiting = [f"stage {leg.station.name!r} has no worker" for leg in self.legs if not leg.station.ready]
        return "; ".join(broken or waiting)

    def submit(
        self, tensors: Tensors, *, parameters: Parameters = {}, deadline: float = 0.0, priority: int = 0
    ) -> asyncio.Future[Tensors]:
        """The answer to come. `deadline` counts from now, in seconds. Raises BadInput, Busy, Unavailable at once."""
        future: asyncio.Future[Tensors] = self._loop.create_future()

        def reply(job: Job) -> None:
            if future.cancelled():
                return
            if job.fault is not None:
                future.set_exception(job.fault)
            else:
                future.set_result(job.tensors)

        job = Job(dict(tensors), reply, self.edge.values(parameters), time.monotonic(), priority=priority)
        self.start(job, deadline=deadline)
        future.add_done_callback(lambda done: self.cancel(job) if done.cancelled() else None)
        return future

    def start(self, job: Job, *, deadline: float = 0.0) -> None:
        """Send a job on its way; `job.tensors` holds the inputs by name. Raises BadInput, Busy, Unavailable."""
        try:
            if self.state != "open":
                raise Unavailable(f"model {self.plan.name!r} is {self.state}", hint="try again, or another version")
            tensors = job.tensors
            job.rows = self.edge.check(tensors)
            job.size = size_of(tensors)
            self.door.enter(rows=job.rows, size=job.size)
        except TorchshipError:
            self.meter.lost(reason="REJECTED", seconds=0.0)
            raise
        seconds = min(deadline, self.limits.max_timeout) if deadline > 0 else self.limits.timeout
        job.deadline = job.arrived + seconds
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_SWEEP, self._sweep)
        legs = self.legs
        if len(legs) > 1:
            job.waiting = [len(leg.node.after) for leg in legs]
        job.left = len(legs)
        job.tensors = {key: tensors[name] for name, key in self._inputs}
        for leg in legs:
            if not leg.node.after:
                self._enter(job, leg)

    def _enter(self, job: Job, leg: Leg) -> None:
        """A job comes to a station."""
        tensors = job.tensors
        node = leg.node
        if not node.checked and node.after:
            try:
                take(node, tensors)
            except TorchshipError as fault:
                self._fail(job, fault)
                return
        arrays = [tensors[key] for key in leg.takes]
        batched = node.signature.batched
        count = len(arrays[0]) if batched else 1
        if batched and not count:
            self._passed(
                Visit(job, arrays, 0, self._passed, leg=leg), list(pipeline_rows.empty(node.signature).values())
            )
            return
        visit = Visit(job, arrays, count, self._passed, leg.defaults, leg=leg)
        if job.parameters and node.parameters:
            visit.values = select(node.parameters, job.parameters, node.defaults)
        if leg.loose or visit.values:
            visit.key = (*[arrays[i].shape[1:] for i in leg.loose], *visit.values.items())
        if node.streams:
            visit.part = self._part
        if batched and count > node.max_batch:
            self._cut(visit, node.max_batch)
        else:
            leg.station.put(visit, now=time.monotonic())

    def _cut(self, visit: Visit, most: int) -> None:
        """More rows than a batch: they go as several visits and are joined again."""
        cuts = range(0, visit.rows, most)
        gather = _Gather(visit.leg, [None] * len(cuts), len(cuts))
        now = time.monotonic()
        for index, at in enumerate(cuts):
            arrays = [array[at : at + most] for array in visit.arrays]
            part = Visit(visit.job, arrays, len(arrays[0]), self._gathered, visit.values, visit.key)
            part.leg = (gather, index)
            visit.leg.station.put(part, now=now)

    def _gathered(self, visit: Visit, outputs: list[Array]) -> None:
        gather, index = visit.leg
        gather.parts[index] = outputs
        gather.left -= 1
        if not gather.left:
            visit.leg = gather.leg
            self._passed(visit, [np.concatenate(parts) for parts in zip(*gather.parts, strict=True)])

    def _passed(self, visit: Visit, outputs: list[Array]) -> None:
        """A station has answered: on to the stations that waited for it, or home."""
        job = visit.job
        if job.done:
            return
        leg: Leg = visit.leg
        tensors = job.tensors
        for key, array in zip(leg.gives, outputs, strict=False):
            tensors[key] = array
        job.left -= 1
        for index in leg.followers:
            job.waiting[index] -= 1
            if not job.waiting[index] and not job.done:
                self._enter(job, self.legs[index])
        if not job.left and not job.done:
            self._home(job)

    def _part(self, visit: Visit, outputs: list[Array]) -> None:
        """One answer of a stream."""
        job = visit.job
        if job.done or job.part is None:
            return
        tensors = job.tensors | dict(zip(visit.leg.gives, outputs, strict=True))
        job.part({name: tensors[key] for name, key in self._outputs})

    def _home(self, job: Job) -> None:
        job.done = True
        self._leave(job)
        tensors = job.tensors
        if not self.plan.streams:
            job.tensors = {name: tensors[key] for name, key in self._outputs}
        now = time.monotonic()
        self.meter.succeeded(rows=job.rows, seconds=now - job.arrived)
        self.meter.last = now
        job.reply(job)

    def _leave(self, job: Job) -> None:
        self.door.leave(rows=job.rows, size=job.size)
        if not self.door.jobs:
            self._empty.set()

    def _fail_visit(self, visit: Visit, fault: TorchshipError) -> None:
        self._fail(visit.job, fault)

    def _fail(self, job: Job, fault: TorchshipError) -> None:
        """Straight home with a fault."""
        if job.done:
            return
        job.done = True
        self._leave(job)
        reason = {Cancelled: "CANCELED", Expired: "REJECTED"}.get(type(fault), "BACKEND")
        self.meter.lost(reason=reason, seconds=time.monotonic() - job.arrived)
        job.fault = fault
        job.tensors = {}
        job.reply(job)

    def cancel(self, job: Job) -> None:
        """The caller went away: the job is dropped where it stands, and `reply` is called with Cancelled."""
        self._fail(job, Cancelled("the caller went away"))

    def _sweep(self) -> None:
        """Answer what is too late, wherever it stands; kill what hangs. Runs only while jobs are there."""
        now = time.monotonic()
        late = [
            visit.job
            for leg in self.legs
            for visit in leg.station.sweep(now)
            if visit.job.deadline <= now and not visit.job.done
        ]
        for job in late:
            self._fail(job, job.expired())
        busy = self.door.jobs or any(not leg.station.idle for leg in self.legs)
        self._sweeper = self._loop.call_later(_SWEEP, self._sweep) if busy else None

    def _ping(self) -> None:
        self._pings += 1
        for leg in self.legs:
            leg.station.ping(time.monotonic(), self._pings)
        self._pinger = self._loop.call_later(1.0, self._ping)

    async def stream(
        self, tensors: Tensors, *, parameters: Parameters = {}, deadline: float = 0.0, priority: int = 0
    ) -> AsyncIterator[Tensors]:
        """All answers to one request. Raises as `submit` does, and what the stage raises between two answers."""
        answers: asyncio.Queue[Any] = asyncio.Queue()
        job = Job(dict(tensors), answers.put_nowait, self.edge.values(parameters), time.monotonic(), priority=priority)
        job.part = answers.put_nowait
        self.start(job, deadline=deadline)
        try:
            while (answer := await answers.get()) is not job:
                yield answer
            if job.fault is not None:
                raise job.fault
            if not self.plan.streams:
                yield job.tensors
        finally:
            self.cancel(job)

    def refuse_stream(self) -> None:
        """Raises Unsupported for a model that gives several answers, when only one can be taken."""
        if self.plan.streams:
            raise Unsupported(f"model {self.plan.name!r} streams its answers", hint="call it by a streaming protocol")

    async def drain(self, *, patience: float = 30.0) -> None:
        """Take nothing more, and wait until what is on the line has been answered."""
        self.state = "draining"
        self._empty.clear()
        if self.door.jobs:
            try:
                await asyncio.wait_for(self._empty.wait(), patience)
            except TimeoutError:
                pass

    async def close(self, *, grace: float = 5.0) -> None:
        """Stop all workers and give everything back; may be called twice."""
        if self.state == "closed":
            return
        self.state = "closed"
        await asyncio.gather(*(leg.station.close(grace=grace) for leg in self.legs))
        for handle in (self._sweeper, self._pinger):
            if handle:
                handle.cancel()
