"""A Line: a pipeline's stations in worker processes; jobs go from one to the next and home; faults go straight home.

Rows wait as the arrays that came in, are written once into the shared memory of the worker that takes them, and the
answers are read from there. Law: `Line(plan)(x) == Composed(plan)(x)`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from torchship.artifact import Store
from torchship.errors import BadInput, Busy, Cancelled, Expired, StageFailed, TorchshipError, Unavailable, Unsupported
from torchship.pipeline import rows as pipeline_rows
from torchship.pipeline.composed import take
from torchship.pipeline.planning import Plan
from torchship.serve.engine.admission import Edge
from torchship.serve.engine.layout import Leg, Limits, lay, shorten
from torchship.serve.engine.queue import Door, Job, Visit
from torchship.serve.engine.sequences import Sequences
from torchship.serve.metrics import LineMeter
from torchship.stage import Parameters, select
from torchship.tensors import Array, Tensors
from torchship.wire.messages import Batch, BatchSlice, Outline, RawInputs

_LATE = 2.5  # seconds without a turn of our own, which comes at least once a second
_SWEEP = 0.01  # seconds between two looks at deadlines and hangs


class Line:
    """One version of one model, running. Everything but `open`, `drain` and `close` is synchronous."""

    def __init__(self, plan: Plan, *, store: Store | None = None, limits: Limits | None = None) -> None:
        """Lays the line out; `open` starts the processes."""
        self.plan = plan
        self.limits = limits or Limits()
        self.edge = Edge(plan.signature, parameters=plan.parameters, nan=self.limits.nan)
        self.door = Door(max_rows=self.limits.queue_rows, max_bytes=self.limits.queue_bytes)
        self.meter = LineMeter()
        self.streams = plan.streams
        self.state = "opening"
        self.legs: list[Leg] = []
        self._only: Leg | None = None
        self._outline = Outline(())
        self._sequences: Sequences | None = None
        self._store = store or Store()
        self._inputs = [(spec.name, key) for spec, key in zip(plan.signature.inputs, plan.inputs, strict=True)]
        self._outputs = [(spec.name, key) for spec, key in zip(plan.signature.outputs, plan.outputs, strict=True)]
        self._loop = asyncio.get_running_loop()
        self._sweeper: asyncio.TimerHandle | None = None
        self._pinger: asyncio.TimerHandle | None = None
        self._pings = 0
        self._beat = time.monotonic()
        self._empty: asyncio.Event = asyncio.Event()

    async def open(self) -> Line:
        """Start all workers and wait until they are ready. Raises what a stage raised when it was opened."""
        for node in self.plan.nodes:
            self.legs.append(
                lay(node, store=self._store, limits=self.limits, fail=lambda visit, fault: self._fail(visit.job, fault))
            )
        for leg in self.legs:
            for index in leg.node.after:
                self.legs[index].followers.append(leg.node.index)
                self.legs[index].station.after.append(leg.station)
                leg.station.before.append(self.legs[index].station)
        self._only = shorten(self.plan, self.legs)
        self._sequences = self._sequential()
        if self._only is not None and self._only.station.fits and not self._only.special:
            self.edge.order = self._only.takes
        if self._only is not None and self._only.lands and self._sequences is None:
            self._outline = Outline(self._only.gives)
            self._only.station.land = self._land
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

    def _sequential(self) -> Sequences | None:
        """The book of sequences, where a stage asks for them by naming the parameter `sequence_id`."""
        stations = [leg.station for leg in self.legs if leg.sequential]
        if not stations:
            return None

        def forget(name: str) -> None:
            for station in stations:
                station.pins.forget(name)

        def lost(names: list[str]) -> None:
            for name in names:
                fault = StageFailed(f"the state of sequence {name!r} is lost: its worker is gone", hint="start it anew")
                for job in book.break_off(name):
                    self._fail(job, fault)

        book = Sequences(idle=self.limits.sequence_idle, forget=forget)
        for station in stations:
            station.lost = lost
        return book

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
        values = self.edge.values(parameters) if parameters else {}
        priority = priority or self.limits.priority
        self.start(Job(tensors, _settle, values, time.monotonic(), priority, future, future.cancelled), deadline)
        return future

    def start(self, job: Job, deadline: float = 0.0) -> None:
        """Send a job on its way; `job.tensors` holds the inputs by name. Raises BadInput, Busy, Unavailable."""
        try:
            if self.state != "open":
                raise Unavailable(f"model {self.plan.name!r} is {self.state}", hint="try again, or another version")
            self.edge.admit(job)
            self.door.enter(job)
        except TorchshipError as fault:
            self.meter.lost("REJECTED", 0.0)
            if isinstance(fault, Busy):
                fault.retry_after = self.meter.seconds_for(self.door.rows, job.arrived)
            raise
        limits = self.limits
        job.deadline = job.arrived + (min(deadline, limits.max_timeout) if deadline > 0 else limits.timeout)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_SWEEP, self._sweep)
        if self._sequences is None or self._in_turn(job, self._sequences):
            self._launch(job)

    def _in_turn(self, job: Job, sequences: Sequences) -> bool:
        """Whether no earlier request of the same sequence is on the line."""
        try:
            return not (name := _sequence(job)) or sequences.enter(job, name)
        except BadInput:
            self.door.leave(job)
            self.meter.lost("REJECTED", 0.0)
            raise

    def _launch(self, job: Job) -> None:
        """Enter the stations that wait for no other."""
        if self._only is not None:
            self._enter(job, self._only, job.tensors, job.arrived)
            return
        tensors = job.tensors
        job.tensors = {key: tensors[name] for name, key in self._inputs}
        job.waiting = [len(leg.node.after) for leg in self.legs]
        job.left = len(self.legs)
        for leg in self.legs:
            if not leg.node.after:
                self._enter(job, leg, job.tensors, job.arrived)

    def _enter(self, job: Job, leg: Leg, tensors: Tensors, now: float) -> None:
        """A job comes to a station."""
        if type(tensors) is RawInputs and tensors.layout.usable and not job.parameters and job.rows <= leg.most:
            leg.station.put(Visit(job, tensors.raws, job.rows, self._arrive, leg.defaults, None, leg), now)
            return
        arrays = [tensors[key] for key in leg.takes]
        count = len(arrays[0]) if leg.batched else 1
        visit = Visit(job, arrays, count, self._arrive, leg.defaults, None, leg)
        if leg.special or job.parameters or not 0 < count <= leg.most:
            self._prepare(visit, leg, now)
        else:
            leg.station.put(visit, now)

    def _prepare(self, visit: Visit, leg: Leg, now: float) -> None:
        """What most visits do not need: run-time checks, parameters, lanes, streams, no rows at all, or too many."""
        job, node = visit.job, leg.node
        if not node.checked and node.after:
            try:
                take(node, dict(job.tensors))
            except TorchshipError as fault:
                self._fail(job, fault)
                return
        if leg.batched and not visit.rows:
            self._arrive(visit, list(pipeline_rows.empty(node.signature).values()))
            return
        if job.parameters and node.parameters:
            visit.values = select(node.parameters, job.parameters, node.defaults)
        if leg.padding is not None:
            visit.arrays, lengths = leg.padding.widen(visit.arrays)
            visit.finish = leg.padding.narrowing(lengths, self._arrive)
        if leg.loose or visit.values:
            visit.key = (*[visit.arrays[i].shape[1:] for i in leg.loose], *visit.values.items())
        if leg.sequential:
            visit.sequence = _sequence(job)
        if node.streams:
            visit.part = self._part
        for part in leg.cut(visit) if leg.batched and visit.rows > leg.most else [visit]:
            leg.station.put(part, now)

    def _arrive(self, visit: Visit, outputs: list[Array]) -> None:
        """A station has answered: on to the stations that waited for it, or home."""
        job = visit.job
        if job.done:
            return
        leg: Leg = visit.leg
        if self._only is not None:
            job.tensors = dict(zip(leg.gives, outputs, strict=False))
            self._home(job)
            return
        tensors: Any = job.tensors
        waiting: Any = job.waiting
        for key, array in zip(leg.gives, outputs, strict=False):
            tensors[key] = array
        for key in leg.drops:
            tensors.pop(key, None)
        job.left -= 1
        now = time.monotonic()
        for index in leg.followers:
            waiting[index] -= 1
            if not waiting[index] and not job.done:
                self._enter(job, self.legs[index], tensors, now)
        if not job.left and not job.done:
            if not self.plan.streams:
                job.tensors = {name: tensors[key] for name, key in self._outputs}
            self._home(job)

    def _land(self, visits: list[Visit], rows: list[int], arrays: list[Array]) -> None:
        """A batch is back on a line of one station: each job goes home with its share."""
        batch, leg, now = Batch(self._outline, arrays), self._only, time.monotonic()
        jobs: list[Job] = []
        end = size = 0
        for visit, count in zip(visits, rows, strict=True):
            start, end, job = end, end + count, visit.job
            if visit.leg is not leg:
                visit.finish(visit, [array[start:end] for array in arrays])
            elif not job.done:
                job.done, job.tensors = True, BatchSlice(batch, start, end)
                size += job.size
                jobs.append(job)
        self.door.leave_together(len(jobs), sum([job.rows for job in jobs]), size)
        self.meter.succeeded_together([job.rows for job in jobs], [now - job.arrived for job in jobs])
        if not self.door.jobs:
            self._empty.set()
        for job in jobs:
            job.reply(job)

    def _part(self, visit: Visit, outputs: list[Array]) -> None:
        """One answer of a stream."""
        job = visit.job
        if job.done or job.part is None:
            return
        if self._only is not None:
            job.part(dict(zip(visit.leg.gives, outputs, strict=True)))
            return
        tensors = {**job.tensors, **dict(zip(visit.leg.gives, outputs, strict=True))}
        job.part({name: tensors[key] for name, key in self._outputs})

    def _home(self, job: Job) -> None:
        job.done = True
        self.door.leave(job)
        now = time.monotonic()
        self.meter.succeeded(job.rows, now - job.arrived)
        if not self.door.jobs:
            self._empty.set()
        job.reply(job)
        if self._sequences is not None:
            self._follow(job, self._sequences, now)

    def _follow(self, job: Job, sequences: Sequences, now: float) -> None:
        """The next of its sequence may go."""
        name = _sequence(job)
        following = sequences.left(job, name, now) if name else None
        if following is not None:
            self._loop.call_soon(self._launch, following)

    def _fail(self, job: Job, fault: TorchshipError) -> None:
        """Straight home with a fault."""
        if job.done:
            return
        job.done = True
        self.door.leave(job)
        if not self.door.jobs:
            self._empty.set()
        reason = {Cancelled: "CANCELED", Expired: "REJECTED"}.get(type(fault), "BACKEND")
        now = time.monotonic()
        self.meter.lost(reason, now - job.arrived)
        job.fault = fault
        job.tensors = {}
        job.reply(job)
        if self._sequences is not None:
            self._follow(job, self._sequences, now)

    def cancel(self, job: Job) -> None:
        """The caller went away: the job is dropped where it stands, and `reply` is called with Cancelled."""
        self._fail(job, Cancelled("the caller went away"))

    def _sweep(self) -> None:
        """Answer what is too late, drop what nobody waits for, kill what hangs. Runs only while jobs are there."""
        now = self._now()
        jobs = [visit.job for leg in self.legs for visit in leg.station.sweep(now)]
        jobs += self._sequences.waiting if self._sequences is not None else []
        for job in jobs:
            if job.deadline <= now and not job.done:
                self._fail(job, job.expired())
            elif job.cancelled or (job.gone is not None and job.gone()):
                self.cancel(job)
        busy = self.door.jobs or any(not leg.station.idle for leg in self.legs)
        self._sweeper = self._loop.call_later(_SWEEP, self._sweep) if busy else None

    def _now(self) -> float:
        """The time. When we were held up ourselves, workers are not blamed for what we did not hear meanwhile."""
        before, self._beat = self._beat, time.monotonic()
        if (late := self._beat - before) > _LATE:
            for worker in [worker for leg in self.legs for worker in leg.station.workers]:
                worker.heard += late
        return self._beat

    def _ping(self) -> None:
        self._pings += 1
        now = self._now()
        self.meter.mark(now)
        if self._sequences is not None:
            self._sequences.sweep(now)
        for leg in self.legs:
            leg.station.ping(now, self._pings)
        self._pinger = self._loop.call_later(1.0, self._ping)

    async def stream(
        self, tensors: Tensors, *, parameters: Parameters = {}, deadline: float = 0.0, priority: int = 0
    ) -> AsyncIterator[Tensors]:
        """All answers to one request. Raises as `submit` does, and what the stage raises between two answers."""
        answers: asyncio.Queue[Any] = asyncio.Queue()
        values = self.edge.values(parameters)
        job = Job(tensors, answers.put_nowait, values, time.monotonic(), priority or self.limits.priority)
        job.part = answers.put_nowait
        self.start(job, deadline)
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


def _settle(job: Job) -> None:
    """Put a job's end into the future in its context."""
    future = job.context
    if future.done():
        return
    if job.fault is not None:
        future.set_exception(job.fault)
    else:
        future.set_result(job.tensors)


def _sequence(job: Job) -> str:
    """The name of the sequence that a job belongs to; empty when to none (0 is none, as Triton has it)."""
    return str(job.parameters.get("sequence_id", "") or "")
