"""A station: one stage of a line, its queue, and the replicas that run it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torchship.errors import StageFailed, TorchshipError, Unavailable
from torchship.pipeline.faults import revive
from torchship.serve.engine.ipc.messages import BatchDone
from torchship.serve.engine.queue import FOREVER, Dispatch, Span, StageCall
from torchship.serve.engine.replica import InFlightBatch, Replica, StartReplica
from torchship.serve.engine.sequences import Pins
from torchship.serve.engine.spec import WorkerSpec
from torchship.serve.metrics import StationMeter
from torchship.tensors import Array

_log = logging.getLogger("torchship.line")
_QUICK = 2e-3  # seconds; a batch that takes longer is worth waiting for before the next one is closed
_MARGIN = 1e-3  # seconds before the expected end of a batch at which the next one is sent
_BURST = 64  # calls of a job stage that travel in one message
_RUN_TIMEOUT = 60.0  # seconds, where the model says nothing else and has no longer time-out
_LIVES = 2  # crashes that a job survives alone before it is blamed
_LOOP = 5  # quick crashes in a row that open the circuit
_PING_EVERY = 5.0  # seconds
_PING_TIMEOUT = 15.0
_BURIAL = 5.0  # seconds that a killed worker has to be gone
_SPARE_EVERY = 30.0  # seconds between two attempts to open a spare replica
_BACKLOG = 4  # batches that may wait at the next station before this one pauses


class Station:
    """Visits come in by `put`; their `finish` or the line's `fail` is called for each, once."""

    def __init__(
        self,
        specs: list[WorkerSpec],
        *,
        start: StartReplica,
        turns: asyncio.Semaphore,
        fail: Callable[[StageCall, TorchshipError], None],
    ) -> None:
        """One specification for each copy, which differ in their placement only; `start` makes a replica of one.

        `turns` bounds how many replicas, of all stations that share it, open at once.
        """
        model, self.limits = specs[0].model, specs[0].limits
        self.name = model.name
        self.signature = model.signature
        self.max_batch = model.max_batch
        self.copies = len(specs)
        self.fits = model.fits
        most = self.max_batch if self.signature.batched else 2**31
        self.queue = Dispatch(max_batch=most, max_wait=self.limits.max_wait)
        self.replicas: list[Replica] = []
        self.meter = StationMeter()
        self.broken: Unavailable | None = None
        self.after: list[Station] = []
        self.before: list[Station] = []
        self.pins = Pins()
        self.on_done: Callable[[list[StageCall], list[int], list[Array]], None] = self._deliver
        self.on_lost: Callable[[list[str]], None] = lambda names: None
        self._specs = specs
        self._start_replica = start
        self._turns = turns
        self._fail = fail
        self._run_timeout = self.limits.run_timeout or max(_RUN_TIMEOUT, self.limits.timeout)
        self._pace = 0.0
        self._crashes = 0
        self._closing = False
        self._pumping = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = FOREVER
        self._opening: dict[Replica, asyncio.Future[None]] = {}
        self._leaving: set[Replica] = set()
        self._spent: set[Replica] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._spare: Replica | None = None
        self._spare_at = 0.0
        self._sparing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start all replicas and wait until they are ready. Raises what the stage raised when it was opened."""
        try:
            await all_of(self._open_one(spec) for spec in self._specs)
        except BaseException:
            await self.close()
            raise

    async def _open_one(self, spec: WorkerSpec, *, spare: bool = False) -> None:
        """Start one replica when it is its turn, so that its time-out is its own. Raises TorchshipError."""
        async with self._turns:
            replica = self._start_replica(spec, self)
            if spare:
                self._spare = replica
            else:
                self.replicas.append(replica)
            opened = self._opening[replica] = self._loop.create_future()
            await opened

    @property
    def ready(self) -> bool:
        """Whether a replica is there to take a batch."""
        return not self._closing and any(replica.state == "ready" for replica in self.replicas)

    @property
    def processes(self) -> list[Replica]:
        """The replicas, and the one that is kept to spare."""
        return self.replicas if self._spare is None else [*self.replicas, self._spare]

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not len(self.queue) and not self.pins and not any(replica.in_flight for replica in self.replicas)

    def put(self, call: StageCall, now: float) -> None:
        """Queue a call; it leaves with the next batch that has room for it."""
        if self.broken:
            self._fail(call, self.broken)
            return
        call.since = now
        if call.sequence:
            if not self.pins.put(call, replicas=self.replicas):
                self._fail(call, Unavailable(f"stage {self.name!r} has no worker", hint="try again"))
        else:
            self.queue.put(call)
        if not self._pumping:
            self.pump_soon()

    def pump_soon(self) -> None:
        """Look for work at the end of this turn of the event loop, so that one turn's requests share a batch."""
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        queue = self.queue
        now = time.monotonic()
        before = queue.rows
        if self.pins.queues:
            for pinned, call in self.pins.take():
                self._send(pinned, [call], now)
        while queue.rows:
            # It does not run ahead of the next station: what it makes would only fill the memory.
            if self.after and any(s.queue.rows >= _BACKLOG * s.max_batch + s.copies for s in self.after):
                break
            replica, at = self._choose(now)
            at = max(at, queue.ready_at())
            if replica is None or at > now:
                self._wake(at)
                break
            batch = self._take(now)
            if not batch:
                break
            self._send(replica, batch, now)
        if queue.dropped:
            dropped, queue.dropped = queue.dropped, []
            for call in dropped:
                self._fail(call, call.job.expired())
        if queue.rows < before:  # also where all that was taken had been answered meanwhile
            self._make_room()

    def _make_room(self) -> None:
        """Stations that did not run ahead of this one may go on."""
        for station in self.before:
            station.pump_soon()

    def _choose(self, now: float) -> tuple[Replica | None, float]:
        """The replica for the next batch, and when it should get it: a busy one shortly before it is done."""
        best: Replica | None = None
        for replica in self.replicas:
            if replica.room and (best is None or len(replica.in_flight) < len(best.in_flight)):
                best = replica
        if best is None:
            return None, FOREVER
        if not best.in_flight or self._pace < _QUICK or self.queue.rows >= self.max_batch:
            return best, 0.0
        return best, max(best.heard, best.in_flight[0].sent) + self._pace - _MARGIN

    def _take(self, now: float) -> list[StageCall]:
        queue = self.queue
        if len(self.replicas) == 1 and self.signature.batched:
            return queue.take(now)
        if self.signature.batched:
            idle = sum(1 for replica in self.replicas if replica.room and not replica.in_flight)
            limit = -(-queue.rows // idle) if idle > 1 else 0
            return queue.take(now, limit=limit)
        batch = []
        room = max(1, min(_BURST, int(_QUICK / self._pace))) if self._pace else 1
        share = -(-len(queue) // max(1, sum(1 for replica in self.replicas if replica.state == "ready")))
        for _ in range(min(room, share)):
            batch += (found := queue.take(now, limit=1))
            if not found or found[0].alone or found[0].part:
                break
        return batch

    def _send(self, replica: Replica, batch: list[StageCall], now: float) -> None:
        try:
            replica.give(batch, now=now)
        except TorchshipError as fault:
            for call in batch:
                self._fail(call, fault)
            return
        if batch[0].part is not None:
            held, job = replica.in_flight[-1], batch[0].job
            job.on_taken, job.on_dropped = partial(replica.taken, held), partial(replica.drop, held)

    def _wake(self, at: float) -> None:
        if at == FOREVER or (self._timer and self._timer_at <= at):
            return
        if self._timer:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_later(max(0.0, at - time.monotonic()), self._awake)

    def _awake(self) -> None:
        self._timer, self._timer_at = None, FOREVER
        self._pump()

    def on_result(self, replica: Replica, batch: InFlightBatch, done: BatchDone, outputs: list[list[Array]]) -> None:
        """Hand the answers to the calls of a batch, and look for the next one."""
        if self.queue.rows or self.pins.queues:
            self.pump_soon()
        if done.last:
            self._spent.add(replica)
        try:
            self._hand_out(batch, done, outputs)
        except Exception as fault:  # whatever is wrong with an answer: nobody may wait for it forever
            _log.exception("station %s: an answer of worker %s is unusable", self.name, replica.pid)
            for call in batch.calls:
                self._fail(call, StageFailed(f"stage {self.name!r} gave an unusable answer: {fault}"))

    def _hand_out(self, batch: InFlightBatch, done: BatchDone, outputs: list[list[Array]]) -> None:
        calls = batch.calls
        if done.more and (part := calls[0].part) is not None:
            for arrays in outputs:
                batch.unread += 1
                part(calls[0], arrays)
            return
        self._count(batch, done, time.monotonic())
        for fault in done.faults:
            self._fail(calls[fault.job], revive(fault, stage=self.name))
        for result, arrays in zip(done.results, outputs, strict=True):
            self.on_done(calls[result.first : result.first + len(result.rows)], result.rows, arrays)
        if batch.stream:
            calls[0].job.on_taken = calls[0].job.on_dropped = None
            calls[0].finish(calls[0], [])

    @staticmethod
    def _deliver(calls: list[StageCall], rows: list[int], arrays: list[Array]) -> None:
        if len(calls) == 1:
            calls[0].finish(calls[0], arrays)
            return
        at = 0
        for call, count in zip(calls, rows, strict=True):
            end = at + count
            call.finish(call, [array[at:end] for array in arrays])
            at = end

    def _count(self, batch: InFlightBatch, done: BatchDone, now: float) -> None:
        calls = batch.calls
        began, ended = done.began * 1e-9, done.ended * 1e-9
        runs = 1 if self.signature.batched else len(calls)
        rows = sum([call.rows for call in calls])
        share = (ended - began) / runs
        self._pace = self._pace * 0.8 + share * 0.2 if self._pace else share
        self._crashes = 0
        queued = len(calls) * batch.sent - sum([call.since for call in calls])
        shared = max(0.0, began - batch.sent), ended - began, now - ended
        self.meter.count(len(calls), rows, runs, queued, shared)
        for call in calls:
            if call.job.spans is not None:
                call.job.spans.append(Span(self.name, call.since, batch.sent, began, ended, now, rows))

    def on_open(self, replica: Replica) -> None:
        """A replica is ready."""
        self.broken = None
        opened = self._opening.pop(replica, None)
        if opened is not None and not opened.done():
            opened.set_result(None)
        self.pump_soon()

    def on_log(self, replica: Replica, line: str) -> None:
        """Pass a worker's line on to the log."""
        _log.info("%s", line, extra={"station": self.name, "pid": replica.pid})

    def on_end(self, replica: Replica, batches: list[InFlightBatch], reason: str) -> None:
        """A replica is gone: replace it, and run again what it held; the batch that it ran is under suspicion."""
        spare = replica is self._spare
        if spare:
            self._spare = None
        else:
            self.replicas.remove(replica)
        text = f"worker {replica.pid} {reason or 'stopped'}"
        if reason and replica.fault is None:  # a stage that cannot be opened is told by whoever wanted it
            _log.warning("station %s: %s", self.name, text, extra={"station": self.name, "pid": replica.pid})
        opened = self._opening.pop(replica, None)
        if opened is not None:
            if not opened.done():
                opened.set_exception(replica.fault or Unavailable(f"stage {self.name!r} did not open: {text}"))
            return
        if spare:
            return
        names, waiting = self.pins.lose(replica)
        self.on_lost(names)
        self._again(waiting)
        ran = 0 if replica in self._spent else 1  # batches that it had begun
        for batch in reversed(batches[ran:]):
            self._again(batch.calls)
        for batch in batches[:ran]:
            self._suspect(batch, text)
        if not self._closing:
            self.meter.restarts += 1
            if replica not in self._leaving:
                self._crashes = 0 if replica.served else self._crashes + 1
                if not self._promote():
                    self._spawn(self._replace(replica.spec, text))
        self._leaving.discard(replica)
        self._spent.discard(replica)
        self.pump_soon()

    def _again(self, calls: list[StageCall]) -> None:
        for call in reversed(calls):
            if call.sequence:
                text = f"the state of sequence {call.sequence!r} is lost: its worker is gone"
                self._fail(call, StageFailed(text, hint="start it anew"))
            elif self._closing:  # nothing runs twice because the server stops
                self._fail(call, Unavailable(f"stage {self.name!r} was closed"))
            else:
                self.queue.put_back(call)

    def _suspect(self, batch: InFlightBatch, text: str) -> None:
        """One of these jobs may have killed the worker: each runs alone now; who kills again and again is to blame."""
        alone = len(batch.calls) == 1
        innocent = []
        for call in batch.calls:
            call.crashes += alone
            call.alone = True
            if call.crashes >= _LIVES or call.part:
                self._fail(call, StageFailed(f"stage {self.name!r}: {text}", hint="it died while it ran this input"))
            else:
                innocent.append(call)
        self._again(innocent)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _keep_spare(self, now: float) -> None:
        """Where the only copy may be lost, have another one open and waiting, if that is wanted and there is room."""
        wanted = self.limits.spare
        if self._spare or now < self._spare_at or wanted is False or self.copies > 1 or not self.ready:
            return
        self._spare_at = now + _SPARE_EVERY
        card, share = self.replicas[0].card, self._specs[0].placement.memory_share
        if wanted if card is None else card.holds_another(share=share):
            self._sparing = self._spawn(self._open_spare())
        elif wanted and card is not None:
            self._spare_at = FOREVER
            numbers = f"{card.held / 2**30:.1f} GiB each, {card.free / 2**30:.1f} GiB of the card are free"
            _log.warning("station %s: no room for a spare worker: %s, its share is %g", self.name, numbers, share)

    async def _open_spare(self) -> None:
        try:
            await self._open_one(self._specs[0], spare=True)
        except TorchshipError as fault:
            _log.warning("station %s: no spare worker: %s", self.name, fault.line)

    def _promote(self) -> bool:
        """Let the spare replica take a place, if it is ready; the next ping opens another."""
        spare = self._spare
        if spare is None or spare.state != "ready":
            return False
        self._spare, self._spare_at = None, 0.0
        self.replicas.append(spare)
        self.pump_soon()
        return True

    async def _replace(self, spec: WorkerSpec, text: str) -> None:
        """Start a replica again and again until one opens, after longer and longer pauses."""
        while not self._closing:
            if self._sparing is not None:
                await asyncio.wait([self._sparing])
                if self._promote():
                    return
            pause = min(30.0, 0.05 * 2**self._crashes) if self._crashes else 0.0
            if self._crashes >= _LOOP and not self.ready:
                self._break(text, pause)
            await asyncio.sleep(pause)
            try:
                await self._open_one(spec)
                return
            except TorchshipError as fault:
                text = str(fault)
                self.meter.restarts += 1
                self._crashes += 1

    async def _succeed(self, replica: Replica, reason: str) -> None:
        """Open the successor of a replica that works but has to go, and only then let it finish and leave."""
        self._leaving.add(replica)
        _log.warning("station %s: worker %s %s", self.name, replica.pid, reason, extra={"station": self.name})
        try:
            if not self._promote():
                await self._open_one(replica.spec)
        except TorchshipError as fault:
            self._leaving.discard(replica)
            if replica.state == "ended":
                await self._replace(replica.spec, str(fault))
            else:
                replica.kill(reason)
            return
        replica.stop(grace=self._patience())

    def _break(self, text: str, delay: float) -> None:
        """Too many crashes in a row: fail what waits, and refuse, until a worker opens again."""
        self.broken = Unavailable(
            f"stage {self.name!r} cannot be kept running: {text}",
            hint=f"the next attempt is in {delay:.1f} s",
            retry_after=delay,
        )
        _log.error("station %s: circuit open: %s", self.name, text, extra={"station": self.name})
        for call in self.queue.clear():
            self._fail(call, self.broken)
        self._make_room()

    def _patience(self, calls: Sequence[StageCall] = ()) -> float:
        """How long a batch may run: what is configured, or longer where one of its requests gives itself longer."""
        return max([self._run_timeout, *(call.job.asked for call in calls)])

    def sweep(self, now: float) -> Iterator[StageCall]:
        """Kill what hangs; yield everything that waits or runs, for the line to look at its deadlines."""
        for replica in self.replicas:
            if replica.in_flight:
                self._check_hang(replica, replica.in_flight[0], now)
                for batch in replica.in_flight:
                    yield from batch.calls
        yield from self.queue
        yield from self.pins

    def _check_hang(self, replica: Replica, batch: InFlightBatch, now: float) -> None:
        if replica.state != "ready" or not self._hangs(replica, batch, now):
            return
        if len(batch.calls) == 1:
            batch.calls[0].crashes = _LIVES  # what is too slow is not run a second time
        replica.kill(f"hung: no answer for {self._patience(batch.calls):g} s")

    def _hangs(self, replica: Replica, batch: InFlightBatch, now: float) -> bool:
        """Whether a batch has run for longer than it may, and not because a stream waits for its caller."""
        silent = now - max(batch.sent, replica.heard)
        late = silent > self._run_timeout and silent > self._patience(batch.calls)
        return late and not (batch.unread and not batch.calls[0].job.done)

    def stuck(self, now: float) -> Iterator[str]:
        """Workers that hang and are still there long after they should have been killed: the station cannot help it."""
        for replica in self.processes:
            unburied = replica.killed and now - replica.killed > _BURIAL
            if unburied or (replica.in_flight and self._hangs(replica, replica.in_flight[0], now - _BURIAL)):
                yield f"worker {replica.pid} of stage {self.name!r} hangs, and killing it does not end it"

    def ping(self, now: float, number: int) -> None:
        """Ask idle workers for a sign of life, kill those that gave none, replace those that took too much memory."""
        most = self.limits.memory
        self._keep_spare(now)
        for replica in self.replicas:
            if most and replica.state == "ready" and replica not in self._leaving and (size := replica.size) > most:
                text = f"took {size / 2**20:.0f} MiB, more than its limit of {most / 2**20:.0f} MiB"
                self._spawn(self._succeed(replica, text))
        for replica in self.processes:
            if replica.state != "ready" or replica.in_flight:
                continue
            if now - replica.heard > _PING_TIMEOUT:
                replica.kill(f"gave no sign of life for {_PING_TIMEOUT:g} s")
            elif now - replica.heard > _PING_EVERY:
                replica.ping(number)

    async def close(self, *, grace: float = 5.0) -> None:
        """Stop all replicas: each ends what it runs, within `grace` seconds."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        if self._timer:
            self._timer.cancel()
        replicas = list(self.processes)
        for replica in replicas:
            if replica.state == "opening":
                replica.kill("closed before it was open")
            replica.stop(grace=grace)
        if replicas:
            await asyncio.wait([replica.ended for replica in replicas])
        for call in self.queue.clear():
            self._fail(call, Unavailable(f"stage {self.name!r} was closed"))


async def all_of(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Wait for all of them; when one raises, the others are cancelled and waited for. Raises what it raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
