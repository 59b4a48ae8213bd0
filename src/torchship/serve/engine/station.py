"""A station: one stage of a line, its queue, and the crew of workers that run it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator

import msgspec

from torchship.errors import StageFailed, TorchshipError, Unavailable
from torchship.serve.engine.ipc import arena
from torchship.serve.engine.ipc.signals import Gave, revive
from torchship.serve.engine.pins import Pins
from torchship.serve.engine.queue import FOREVER, Dispatch, Span, Visit
from torchship.serve.engine.replica import Blueprint, Flight, Worker
from torchship.serve.metrics import StationMeter
from torchship.tensors import Array, Signature, numpy_dtype

_log = logging.getLogger("torchship.line")
_QUICK = 2e-3  # seconds; a batch that takes longer is worth waiting for before the next one is closed
_MARGIN = 1e-3  # seconds before the expected end of a batch at which the next one is sent
_BURST = 64  # calls of a job stage that travel in one message
_LIVES = 2  # crashes that a job survives alone before it is blamed
_LOOP = 5  # quick crashes in a row that open the circuit


class Crew(msgspec.Struct, frozen=True, kw_only=True):
    """How many workers, and how patient the station is with them (seconds)."""

    copies: int = 1
    run_timeout: float = 60.0
    ping_every: float = 5.0
    ping_timeout: float = 15.0
    max_wait: float = 0.0
    backlog: int = 4
    memory: int = 0


class Station:
    """Visits come in by `put`; their `finish` or the line's `fail` is called for each, once."""

    def __init__(
        self,
        blueprint: Blueprint,
        *,
        signature: Signature,
        max_batch: int,
        crew: Crew,
        fail: Callable[[Visit, TorchshipError], None],
    ) -> None:
        self.name = blueprint.name
        self.signature = signature
        self.max_batch = max_batch
        self.crew = crew
        self.fits = blueprint.fits
        self.queue = Dispatch(max_batch=max_batch if signature.batched else 2**31, max_wait=crew.max_wait)
        self.workers: list[Worker] = []
        self.meter = StationMeter()
        self.broken: Unavailable | None = None
        self.after: list[Station] = []
        self.before: list[Station] = []
        self.pins = Pins()
        self.land: Callable[[list[Visit], list[int], list[Array]], None] = self._deliver
        self.lost: Callable[[list[str]], None] = lambda names: None
        self._blueprint = blueprint
        self._dtypes = [numpy_dtype(spec.dtype) for spec in signature.outputs]
        self._fail = fail
        self._pace = 0.0
        self._crashes = 0
        self._closing = False
        self._pumping = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = FOREVER
        self._restarts: set[asyncio.TimerHandle] = set()
        self._first: asyncio.Future[None] = self._loop.create_future()

    async def open(self) -> None:
        """Start the crew and wait until all of it is ready. Raises what the stage raised when it was opened."""
        try:
            for _ in range(self.crew.copies):
                self.workers.append(Worker(self._blueprint, boss=self, loop=self._loop))
            await self._first
        except BaseException:
            await self.close()
            raise

    @property
    def ready(self) -> bool:
        """Whether a worker is there to take a batch."""
        return not self._closing and any(worker.state == "ready" for worker in self.workers)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not len(self.queue) and not self.pins and not any(worker.flights for worker in self.workers)

    def put(self, visit: Visit, now: float) -> None:
        """Take a visit in; it leaves with the next batch that has room for it."""
        if self.broken:
            self._fail(visit, self.broken)
            return
        visit.since = now
        if visit.sequence:
            if not self.pins.put(visit, workers=self.workers):
                self._fail(visit, Unavailable(f"stage {self.name!r} has no worker", hint="try again"))
        else:
            self.queue.put(visit)
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
        sent = False
        if self.pins.queues:
            for pinned, visit in self.pins.take():
                self._send(pinned, [visit], now)
        while queue.rows:
            if self.after and self._blocked():
                break
            worker, at = self._choose(now)
            at = max(at, queue.ready_at())
            if worker is None or at > now:
                self._wake(at)
                break
            batch = self._take(now)
            if not batch:
                break
            sent = True
            self._send(worker, batch, now)
        if queue.dropped:
            sent = True
            self._drop()
        if sent:
            self._make_room()

    def _make_room(self) -> None:
        """Stations that did not run ahead of this one may go on."""
        for station in self.before:
            station.pump_soon()

    def _blocked(self) -> bool:
        """A station does not run ahead of the next: what it makes would only fill the memory."""
        return any(s.queue.rows >= self.crew.backlog * s.max_batch + s.crew.copies for s in self.after)

    def _choose(self, now: float) -> tuple[Worker | None, float]:
        """The worker for the next batch, and when it should get it: a busy one shortly before it is done."""
        best: Worker | None = None
        for worker in self.workers:
            if worker.room and (best is None or len(worker.flights) < len(best.flights)):
                best = worker
        if best is None:
            return None, FOREVER
        if not best.flights or self._pace < _QUICK or self.queue.rows >= self.max_batch:
            return best, 0.0
        return best, max(best.heard, best.flights[0].sent) + self._pace - _MARGIN

    def _take(self, now: float) -> list[Visit]:
        queue = self.queue
        if len(self.workers) == 1 and self.signature.batched:
            return queue.take(now)
        if self.signature.batched:
            idle = sum(1 for worker in self.workers if worker.room and not worker.flights)
            limit = -(-queue.rows // idle) if idle > 1 else 0
            return queue.take(now, limit=limit)
        batch = []
        room = max(1, min(_BURST, int(_QUICK / self._pace))) if self._pace else 1
        share = -(-len(queue) // max(1, sum(1 for worker in self.workers if worker.state == "ready")))
        for _ in range(min(room, share)):
            batch += (found := queue.take(now, limit=1))
            if not found or found[0].alone or found[0].part:
                break
        return batch

    def _send(self, worker: Worker, batch: list[Visit], now: float) -> None:
        try:
            worker.give(batch, now=now)
        except TorchshipError as fault:
            for visit in batch:
                self._fail(visit, fault)

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

    def _drop(self) -> None:
        dropped, self.queue.dropped = self.queue.dropped, []
        for visit in dropped:
            self._fail(visit, visit.job.expired())

    def gave(self, worker: Worker, flight: Flight, gave: Gave, memory: memoryview) -> None:
        """Hand the answers to the visits of a batch, and look for the next one."""
        if self.queue.rows or self.pins.queues:
            self.pump_soon()
        try:
            self._gave(flight, gave, memory)
        except Exception as fault:  # whatever is wrong with an answer: nobody may wait for it forever
            _log.exception("station %s: an answer of worker %s is unusable", self.name, worker.pid)
            for visit in flight.visits:
                self._fail(visit, StageFailed(f"stage {self.name!r} gave an unusable answer: {fault}"))

    def _gave(self, flight: Flight, gave: Gave, memory: memoryview) -> None:
        visits = flight.visits
        self._count(flight, gave, time.monotonic())
        for fault in gave.faults:
            self._fail(visits[fault.job], revive(fault, stage=self.name))
        for piece in gave.pieces:
            arrays: list[Array] = []
            for block, dtype in zip(piece.blocks, self._dtypes, strict=True):
                array = arena.read(block, dtype=dtype, memory=memory)
                arrays.append(array if dtype.hasobject else array.copy())
            part = visits[piece.first : piece.first + len(piece.rows)]
            if gave.more and part[0].part:
                part[0].part(part[0], arrays)
            else:
                self.land(part, piece.rows, arrays)
        if flight.stream and not gave.more and not gave.faults:
            visits[0].finish(visits[0], [])

    @staticmethod
    def _deliver(visits: list[Visit], rows: list[int], arrays: list[Array]) -> None:
        if len(visits) == 1:
            visits[0].finish(visits[0], arrays)
            return
        at = 0
        for visit, count in zip(visits, rows, strict=True):
            end = at + count
            visit.finish(visit, [array[at:end] for array in arrays])
            at = end

    def _count(self, flight: Flight, gave: Gave, now: float) -> None:
        if gave.more:
            return
        visits = flight.visits
        began, ended = gave.began * 1e-9, gave.ended * 1e-9
        calls = 1 if self.signature.batched else len(visits)
        rows = sum([visit.rows for visit in visits])
        share = (ended - began) / calls
        self._pace = self._pace * 0.8 + share * 0.2 if self._pace else share
        self._crashes = 0
        queued = len(visits) * flight.sent - sum([visit.since for visit in visits])
        self.meter.count(
            len(visits),
            rows,
            calls,
            queued,
            packing=max(0.0, began - flight.sent),
            running=ended - began,
            passing=now - ended,
        )
        for visit in visits:
            if visit.job.spans is not None:
                visit.job.spans.append(Span(self.name, visit.since, flight.sent, began, ended, now, rows))

    def opened(self, worker: Worker) -> None:
        """A worker is ready; the station is, once all of the first crew are."""
        self.broken = None
        if not self._first.done() and all(other.state == "ready" for other in self.workers):
            self._first.set_result(None)
        self.pump_soon()

    def said(self, worker: Worker, line: str) -> None:
        """Pass a worker's line on to the log."""
        _log.info("%s", line, extra={"station": self.name, "pid": worker.pid})

    def ended(self, worker: Worker, flights: list[Flight], reason: str) -> None:
        """A worker is gone: replace it, and run again what it held; the batch that it ran is under suspicion."""
        self.workers.remove(worker)
        text = f"worker {worker.pid} {reason or 'stopped'}"
        if reason and worker.fault is None:  # a stage that cannot be opened is told by whoever wanted it
            _log.warning("station %s: %s", self.name, text, extra={"station": self.name, "pid": worker.pid})
        if not self._first.done():
            self._first.set_exception(worker.fault or Unavailable(f"stage {self.name!r} did not open: {text}"))
            return
        names, waiting = self.pins.lose(worker)
        self.lost(names)
        self._again(waiting)
        for flight in reversed(flights[1:]):
            self._again(flight.visits)
        for flight in flights[:1]:
            self._suspect(flight, text)
        if not self._closing:
            self._replace(worker, text)
        self.pump_soon()

    def _again(self, visits: list[Visit]) -> None:
        for visit in reversed(visits):
            if visit.sequence:
                text = f"the state of sequence {visit.sequence!r} is lost: its worker is gone"
                self._fail(visit, StageFailed(text, hint="start it anew"))
            else:
                self.queue.put_back(visit)

    def _suspect(self, flight: Flight, text: str) -> None:
        """One of these jobs may have killed the worker: each runs alone now; who kills again and again is to blame."""
        alone = len(flight.visits) == 1
        innocent = []
        for visit in flight.visits:
            visit.crashes += alone
            visit.alone = True
            if visit.crashes >= _LIVES or visit.part:
                self._fail(visit, StageFailed(f"stage {self.name!r}: {text}", hint="it died while it ran this input"))
            else:
                innocent.append(visit)
        self._again(innocent)

    def _replace(self, worker: Worker, text: str) -> None:
        self.meter.restarts += 1
        self._crashes = 0 if worker.served else self._crashes + 1
        delay = 0.0 if not self._crashes else min(30.0, 0.05 * 2**self._crashes)
        if self._crashes >= _LOOP and not self.ready:
            self._break(text, delay)

        def start() -> None:
            self._restarts.discard(handle)
            self._start(text)

        handle = self._loop.call_later(delay, start)
        self._restarts.add(handle)

    def _start(self, text: str) -> None:
        try:
            self.workers.append(Worker(self._blueprint, boss=self, loop=self._loop))
        except Unavailable as fault:
            self._crashes += 1
            self._break(str(fault), 1.0)
            handle = self._loop.call_later(1.0, self._start, text)
            self._restarts.add(handle)

    def _break(self, text: str, delay: float) -> None:
        """Too many crashes in a row: fail what waits, and refuse, until a worker opens again."""
        self.broken = Unavailable(
            f"stage {self.name!r} cannot be kept running: {text}",
            hint=f"the next attempt is in {delay:.1f} s",
            retry_after=delay,
        )
        _log.error("station %s: circuit open: %s", self.name, text, extra={"station": self.name})
        for visit in self.queue.clear():
            self._fail(visit, self.broken)
        self._make_room()

    def sweep(self, now: float) -> Iterator[Visit]:
        """Kill what hangs; yield everything that waits or runs, for the line to look at its deadlines."""
        for worker in self.workers:
            if worker.flights:
                flight = worker.flights[0]
                if now - max(flight.sent, worker.heard) > self.crew.run_timeout and worker.state == "ready":
                    worker.kill(f"hung: no answer for {self.crew.run_timeout:g} s")
                for flight in worker.flights:
                    yield from flight.visits
        yield from self.queue
        yield from self.pins

    def ping(self, now: float, number: int) -> None:
        """Ask idle workers for a sign of life; kill those that gave none, and those that took too much memory."""
        for worker in self.workers:
            if self.crew.memory and (size := worker.size) > self.crew.memory:
                worker.kill(f"took {size / 2**20:.0f} MiB, more than its limit of {self.crew.memory / 2**20:.0f} MiB")
            if worker.state != "ready" or worker.flights:
                continue
            if now - worker.heard > self.crew.ping_timeout:
                worker.kill(f"gave no sign of life for {self.crew.ping_timeout:g} s")
            elif now - worker.heard > self.crew.ping_every:
                worker.ping(number)

    async def close(self, *, grace: float = 5.0) -> None:
        """Stop the crew: each worker ends what it runs, within `grace` seconds."""
        self._closing = True
        for handle in self._restarts:
            handle.cancel()
        if self._timer:
            self._timer.cancel()
        workers = list(self.workers)
        for worker in workers:
            if worker.state == "opening":
                worker.kill("closed before it was open")
            worker.stop(grace=grace)
        if workers:
            await asyncio.wait([worker.ended for worker in workers])
        if self._first.done() and not self._first.cancelled():
            self._first.exception()
        for visit in self.queue.clear():
            self._fail(visit, Unavailable(f"stage {self.name!r} was closed"))
