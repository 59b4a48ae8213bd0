"""A Line: a pipeline's stations in worker processes; jobs go from one to the next and home; faults go straight home.

Rows wait as the arrays that came in, are written once into the shared memory of the worker that takes them, and the
answers are read from there. Law: `Line(plan)(x) == Composed(plan)(x)`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from torchship import hardware
from torchship.artifact import Store
from torchship.errors import BadInput, Busy, Cancelled, Expired, StageFailed, TorchshipError, Unavailable
from torchship.pipeline import rows as pipeline_rows
from torchship.pipeline.composed import take
from torchship.pipeline.planning import Node, Plan
from torchship.serve.engine.admission import AdmissionLimit, RequestValidator
from torchship.serve.engine.padding import Padding
from torchship.serve.engine.queue import Job, StageCall
from torchship.serve.engine.replica import LocalReplica, StartReplica
from torchship.serve.engine.sequences import Sequences
from torchship.serve.engine.spec import LineLimits, StageModel, WorkerSpec, placements
from torchship.serve.engine.station import Station, all_of
from torchship.serve.metrics import LineMeter
from torchship.stage import Parameters, Value, select
from torchship.tensors import Array, Tensors
from torchship.wire.messages import Batch, BatchSlice, Outline, RawInputs

_LONGEST = 3600.0  # seconds; the most that a request can ask for, unless its model's own time-out is longer
_LATE = 2.5  # seconds without a turn of our own, which comes at least once a second
_SWEEP = 0.01  # seconds between two looks at deadlines and hangs


@dataclass(slots=True, eq=False)
class StageNode:
    """A node of the plan with its station: the slots it takes, gives and lets go, and the nodes that wait for it.

    `loose` are the inputs whose shape varies, or that may be absent; `special`: its calls need more than to be queued.
    """

    planned: Node
    station: Station
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    defaults: dict[str, Value]
    loose: tuple[int, ...]
    batched: bool
    most: int
    special: bool
    sequential: bool = False
    padding: Padding | None = None
    drops: tuple[str, ...] = ()
    followers: list[int] = field(default_factory=list)

    def cut(self, call: StageCall) -> list[StageCall]:
        """More rows than a batch: several calls, whose `node` is their number and whose answers are joined again."""
        starts = range(0, call.rows, self.most)
        parts: list[list[Array]] = [[]] * len(starts)

        def finish(part: StageCall, outputs: list[Array]) -> None:
            parts[part.node] = outputs
            if all(parts):
                call.finish(call, [np.concatenate(found) for found in zip(*parts, strict=True)])

        chunks: list[list[Any]] = [
            [None if array is None else array[start : start + self.most] for array in call.arrays] for start in starts
        ]
        return [
            StageCall(call.job, arrays, len(arrays[0]), finish, call.values, call.key, index)
            for index, arrays in enumerate(chunks)
        ]


class Line:
    """One version of one model, running. Everything but `open`, `drain` and `close` is synchronous."""

    def __init__(
        self,
        plan: Plan,
        *,
        store: Store | None = None,
        limits: LineLimits | None = None,
        start: StartReplica = LocalReplica,
        turns: asyncio.Semaphore | None = None,
    ) -> None:
        """`open` starts the replicas, each by a call of `start`: by default, processes on this machine.

        `turns` bounds how many open at once, of all lines that share it: by default, one for each core.
        """
        self.plan = plan
        self.limits = limits or LineLimits()
        self.validator = RequestValidator(plan.signature, parameters=plan.parameters, nan=self.limits.nan)
        self.admission = AdmissionLimit(max_rows=self.limits.queue_rows, max_bytes=self.limits.queue_bytes)
        self.meter = LineMeter()
        self.streams = plan.streams
        self.state = "opening"
        store, turns = store or Store(), turns or asyncio.Semaphore(hardware.cores())
        self.nodes = [self._build(planned, store, start, turns) for planned in plan.nodes]
        self.stations = [node.station for node in self.nodes]
        for node in self.nodes:
            for index in node.planned.after:
                self.nodes[index].followers.append(node.planned.index)
                self.stations[index].after.append(node.station)
                node.station.before.append(self.stations[index])
        self._only = only = _shorten(plan, self.nodes)
        self._outline = Outline(())
        self._sequences: Sequences | None = None
        if sequential := [node.station for node in self.nodes if node.sequential]:
            self._sequences = Sequences([station.pins for station in sequential], idle=self.limits.sequence_idle)
            for station in sequential:
                station.on_lost = partial(self._on_lost, self._sequences)
        if only is not None and only.station.fits and not only.special:
            self.validator.order = only.takes
        plain = self._sequences is None and not plan.streams  # no answer needs a second look
        if plain and only is not None and only.batched and only.padding is None:
            self._outline = Outline(only.gives)  # a batch goes home as one
            only.station.on_done = self._on_batch_done
        self._inputs = [(spec.name, key) for spec, key in zip(plan.signature.inputs, plan.inputs, strict=True)]
        self._outputs = [(spec.name, key) for spec, key in zip(plan.signature.outputs, plan.outputs, strict=True)]
        self._loop = asyncio.get_running_loop()
        self._sweeper: asyncio.TimerHandle | None = None
        self._pinger: asyncio.TimerHandle | None = None
        self._pings = 0
        self._beat = time.monotonic()
        self._empty: asyncio.Event = asyncio.Event()

    def _build(self, node: Node, store: Store, start: StartReplica, turns: asyncio.Semaphore) -> StageNode:
        """The node of the line for one of the plan, its station not yet open."""
        config, signature, limits = node.config, node.signature, self.limits
        model = StageModel(
            name=node.name,
            config=config,
            store=store.named,
            signature=signature,
            max_batch=node.max_batch,
            load_s=node.load_s,
        )
        specs = [WorkerSpec(model=model, placement=place, limits=limits) for place in placements(config, limits)]
        defaults = select(node.parameters, {}, node.defaults)
        return StageNode(
            node,
            Station(specs, start=start, turns=turns, fail=lambda call, fault: self._fail(call.job, fault)),
            takes=node.takes,
            gives=node.gives,
            defaults=defaults,
            loose=model.loose if signature.batched else (),
            batched=signature.batched,
            most=node.max_batch,
            padding=Padding(config.buckets, signature=signature, stage=node.name) if config.buckets else None,
            sequential=any(parameter.name == "sequence_id" for parameter in node.parameters),
            special=bool(model.loose or defaults or node.streams or (node.after and not node.checked)),
        )

    async def open(self) -> Line:
        """Start all workers and wait until they are ready. Raises what a stage raised when it was opened."""
        try:
            await all_of(station.open() for station in self.stations)
        except BaseException:
            await self.close(grace=0.5)
            raise
        self.state = "open"
        self._ping()
        return self

    def _on_lost(self, sequences: Sequences, names: list[str]) -> None:
        """The state of these sequences is gone with its worker: what waits in them cannot run."""
        for name in names:
            fault = StageFailed(f"the state of sequence {name!r} is lost: its worker is gone", hint="start it anew")
            for job in sequences.break_off(name):
                self._fail(job, fault)

    @property
    def ready(self) -> bool:
        """Whether every station has a worker that can take a batch."""
        return self.state == "open" and all(station.ready for station in self.stations)

    def submit(
        self, tensors: Tensors, *, parameters: Parameters = {}, deadline: float = 0.0, priority: int = 0
    ) -> asyncio.Future[Tensors]:
        """The answer to come. `deadline` counts from now, in seconds. Raises BadInput, Busy, Unavailable at once."""
        future: asyncio.Future[Tensors] = self._loop.create_future()
        values = self.validator.values(parameters) if parameters else {}
        priority = priority or self.limits.priority
        self.start(Job(tensors, _settle, values, time.monotonic(), priority, future, future.cancelled), deadline)
        return future

    def start(self, job: Job, deadline: float = 0.0) -> None:
        """Send a job on its way; `job.tensors` holds the inputs by name. Raises BadInput, Busy, Unavailable."""
        try:
            if self.state != "open":
                raise Unavailable(f"model {self.plan.name!r} is {self.state}", hint="try again, or another version")
            self.validator.admit(job)
            self.admission.enter(job)
        except TorchshipError as fault:
            self.meter.lost("REJECTED", 0.0)
            if isinstance(fault, Busy):
                fault.retry_after = self.meter.seconds_for(self.admission.rows, job.arrived)
            raise
        limits = self.limits
        if deadline > 0:
            job.asked = min(deadline, max(_LONGEST, limits.timeout))
        job.deadline = job.arrived + (job.asked or limits.timeout)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_SWEEP, self._sweep)
        if self._sequences is None or self._in_turn(job, self._sequences):
            self._launch(job)

    def _in_turn(self, job: Job, sequences: Sequences) -> bool:
        """Whether no earlier request of the same sequence is on the line."""
        try:
            return not (name := _sequence(job)) or sequences.enter(job, name)
        except BadInput:
            self.admission.leave(1, job.rows, job.size)
            self.meter.lost("REJECTED", 0.0)
            raise

    def _launch(self, job: Job) -> None:
        """Enter the stations that wait for no other."""
        if self._only is not None:
            self._enter(job, self._only, job.tensors, job.arrived)
            return
        tensors = job.tensors
        job.tensors = {key: tensors[name] for name, key in self._inputs}
        job.waiting = [len(node.planned.after) for node in self.nodes]
        job.left = len(self.nodes)
        for node in self.nodes:
            if not node.planned.after:
                self._enter(job, node, job.tensors, job.arrived)

    def _enter(self, job: Job, node: StageNode, tensors: Tensors, now: float) -> None:
        """A job comes to a station."""
        if type(tensors) is RawInputs and tensors.layout.usable and not job.parameters and job.rows <= node.most:
            node.station.put(StageCall(job, tensors.raws, job.rows, self._on_done, node.defaults, None, node), now)
            return
        arrays = [tensors[key] for key in node.takes]
        count = len(arrays[0]) if node.batched else 1
        call = StageCall(job, arrays, count, self._on_done, node.defaults, None, node)
        if node.special or job.parameters or not 0 < count <= node.most:
            self._prepare(call, node, now)
        else:
            node.station.put(call, now)

    def _prepare(self, call: StageCall, node: StageNode, now: float) -> None:
        """What most calls do not need: run-time checks, parameters, lanes, streams, no rows at all, or too many."""
        job, planned = call.job, node.planned
        if not planned.checked and planned.after:
            try:
                take(planned, dict(job.tensors))
            except TorchshipError as fault:
                self._fail(job, fault)
                return
        if node.batched and not call.rows:
            self._on_done(call, list(pipeline_rows.empty(planned.signature).values()))
            return
        if job.parameters and planned.parameters:
            call.values = select(planned.parameters, job.parameters, planned.defaults)
        if node.padding is not None:
            call.arrays, lengths = node.padding.widen(call.arrays)
            narrow = partial(node.padding.narrow, lengths=lengths)
            call.finish = lambda call, outputs: self._on_done(call, narrow(outputs))
        if node.loose or call.values:
            shapes = [None if call.arrays[i] is None else call.arrays[i].shape[1:] for i in node.loose]
            call.key = (*shapes, *call.values.items())
        if node.sequential:
            call.sequence = _sequence(job)
        if planned.streams:
            call.part = self._on_part
        for part in node.cut(call) if node.batched and call.rows > node.most else [call]:
            node.station.put(part, now)

    def _on_done(self, call: StageCall, outputs: list[Array]) -> None:
        """A station has answered: on to the stations that waited for it, or home."""
        job = call.job
        if job.done:
            return
        node: StageNode = call.node
        if self._only is not None:
            job.tensors = dict(zip(node.gives, outputs, strict=False))
            self._finish(job)
            return
        tensors: Any = job.tensors
        waiting: Any = job.waiting
        for key, array in zip(node.gives, outputs, strict=False):
            tensors[key] = array
        for key in node.drops:
            tensors.pop(key, None)
        job.left -= 1
        now = time.monotonic()
        for index in node.followers:
            waiting[index] -= 1
            if not waiting[index] and not job.done:
                self._enter(job, self.nodes[index], tensors, now)
        if not job.left and not job.done:
            if not self.plan.streams:
                job.tensors = {name: tensors[key] for name, key in self._outputs}
            self._finish(job)

    @property
    def executions(self) -> int:
        """Calls of the stage that joins the most: rows answered, divided by these, are the size of a batch."""
        return min(station.meter.calls for station in self.stations)

    def _on_batch_done(self, calls: list[StageCall], rows: list[int], arrays: list[Array]) -> None:
        """A batch is back on a line of one station: each job goes home with its share."""
        batch, node, now = Batch(self._outline, arrays), self._only, time.monotonic()
        jobs: list[Job] = []
        end = size = 0
        for call, count in zip(calls, rows, strict=True):
            start, end, job = end, end + count, call.job
            if call.node is not node:
                call.finish(call, [array[start:end] for array in arrays])
            elif not job.done:
                job.done, job.tensors = True, BatchSlice(batch, start, end)
                size += job.size
                jobs.append(job)
        self.admission.leave(len(jobs), sum([job.rows for job in jobs]), size)
        self.meter.succeeded([job.rows for job in jobs], [now - job.arrived for job in jobs], now)
        if not self.admission.jobs:
            self._empty.set()
        for job in jobs:
            job.reply(job)

    def _on_part(self, call: StageCall, outputs: list[Array]) -> None:
        """One answer of a stream."""
        job = call.job
        if job.done or job.part is None:
            return
        if self._only is not None:
            job.part(dict(zip(call.node.gives, outputs, strict=True)))
            return
        tensors = {**job.tensors, **dict(zip(call.node.gives, outputs, strict=True))}
        job.part({name: tensors[key] for name, key in self._outputs})

    def _finish(self, job: Job) -> None:
        """Home with the answer."""
        now = time.monotonic()
        self.meter.succeeded([job.rows], [now - job.arrived], now)
        self._go_home(job, now)

    def _fail(self, job: Job, fault: TorchshipError) -> None:
        """Straight home with a fault."""
        if job.done:
            return
        if job.on_dropped is not None:
            job.on_dropped()
        reason = {Cancelled: "CANCELED", Expired: "REJECTED"}.get(type(fault), "BACKEND")
        now = time.monotonic()
        self.meter.lost(reason, now - job.arrived)
        job.fault = fault
        job.tensors = {}
        self._go_home(job, now)

    def _go_home(self, job: Job, now: float) -> None:
        """A job leaves the line; the next of its sequence may go."""
        job.done = True
        self.admission.leave(1, job.rows, job.size)
        if not self.admission.jobs:
            self._empty.set()
        job.reply(job)
        if self._sequences is not None and (name := _sequence(job)):
            following = self._sequences.left(job, name, now)
            if following is not None:
                self._loop.call_soon(self._launch, following)

    def cancel(self, job: Job) -> None:
        """The caller went away: the job is dropped where it stands, and `reply` is called with Cancelled."""
        self._fail(job, Cancelled("the caller went away"))

    def _sweep(self) -> None:
        """Answer what is too late, drop what nobody waits for, kill what hangs. Runs only while jobs are there."""
        now = self._now()
        jobs = [call.job for station in self.stations for call in station.sweep(now)]
        jobs += self._sequences.waiting if self._sequences is not None else []
        for job in jobs:
            if job.deadline <= now and not job.done:
                self._fail(job, job.expired())
            elif job.cancelled or (job.gone is not None and job.gone()):
                self.cancel(job)
        busy = self.admission.jobs or any(not station.idle for station in self.stations)
        self._sweeper = self._loop.call_later(_SWEEP, self._sweep) if busy else None

    def _now(self) -> float:
        """The time. When we were held up ourselves, workers are not blamed for what we did not hear meanwhile."""
        before, self._beat = self._beat, time.monotonic()
        if (late := self._beat - before) > _LATE:
            for replica in [replica for station in self.stations for replica in station.processes]:
                replica.heard += late
        return self._beat

    def _ping(self) -> None:
        self._pings += 1
        now = self._now()
        self.meter.mark(now)
        if self._sequences is not None:
            self._sequences.sweep(now)
        for station in self.stations:
            station.ping(now, self._pings)
        self._pinger = self._loop.call_later(1.0, self._ping)

    async def stream(
        self, tensors: Tensors, *, parameters: Parameters = {}, deadline: float = 0.0, priority: int = 0
    ) -> AsyncGenerator[Tensors, None]:
        """All answers to one request. Raises as `submit` does, and what the stage raises between two answers."""
        answers: asyncio.Queue[Any] = asyncio.Queue()
        values = self.validator.values(parameters)
        job = Job(tensors, answers.put_nowait, values, time.monotonic(), priority or self.limits.priority)
        job.part = answers.put_nowait
        self.start(job, deadline)
        try:
            while (answer := await answers.get()) is not job:
                yield answer
                if job.on_taken is not None:
                    job.on_taken()
            if job.fault is not None:
                raise job.fault
            if not self.plan.streams:
                yield job.tensors
        finally:
            self.cancel(job)

    async def drain(self, *, patience: float | None = None) -> None:
        """Take nothing more, and wait until what is on the line has been answered, which its time-outs bound; or for at
        most `patience` seconds."""
        self.state = "draining"
        self._empty.clear()
        if self.admission.jobs:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), patience)

    async def close(self, *, grace: float = 5.0) -> None:
        """Stop all workers and give everything back; may be called again, and is done when they are gone."""
        self.state = "closed"
        await asyncio.gather(*(station.close(grace=grace) for station in self.stations))
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


def _shorten(plan: Plan, nodes: list[StageNode]) -> StageNode | None:
    """A line of one station goes by the request's own names: its node. A row of stations lets go what is used up."""
    if len(nodes) == 1 and nodes[0].gives == plan.outputs:
        only = nodes[0]
        inputs = {key: spec.name for key, spec in zip(plan.inputs, plan.signature.inputs, strict=True)}
        only.takes = tuple([inputs[key] for key in only.takes])
        only.gives = tuple([spec.name for spec in plan.signature.outputs])
        return only
    if all(node.planned.index - 1 in node.planned.after for node in nodes[1:]):
        held = set(plan.inputs)
        for node in nodes:
            held |= set(node.gives)
            node.drops = tuple(held - set(node.planned.keeps))
            held -= set(node.drops)
    return None
