"""Dispatch: the queue in front of a station, and which visits make the next batch; pure, without clocks or sockets.

Batches form by themselves while the workers are busy: whoever becomes free takes what waits, so `max_wait` is 0
unless asked for. Visits whose shapes or parameters differ wait in lanes of their own, since they cannot be joined.
A lower priority number goes first; within one, the longest waiting lane goes first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import msgspec

from torchship.errors import Busy, Expired, TorchshipError
from torchship.stage import Value
from torchship.tensors import Array, Tensors

FOREVER = float("inf")


class Job(msgspec.Struct, eq=False):
    """One request on its way through a line, with its own clock (seconds, monotonic).

    `tensors` holds everything known so far, at the end the outputs; `reply` is called once, with `fault` set when
    there is no answer. `gone` tells whether the caller has left; `waiting` and `left` count the stations ahead.
    """

    tensors: Tensors
    reply: Callable[[Job], None]
    parameters: dict[str, Value]
    arrived: float
    priority: int = 0
    context: Any = None
    gone: Callable[[], bool] | None = None
    deadline: float = FOREVER
    rows: int = 1
    size: int = 0
    done: bool = False
    fault: TorchshipError | None = None
    waiting: list[int] | None = None
    left: int = 1
    part: Callable[[dict[str, Array]], None] | None = None
    spans: list[Span] | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        """The caller has left: the job is dropped at the next sweep."""
        self.cancelled = True

    def expired(self) -> Expired:
        """The error for a job whose deadline has passed."""
        return Expired(
            f"no answer within {self.deadline - self.arrived:g} s", hint="send a longer timeout, or fewer requests"
        )


class Span(msgspec.Struct, frozen=True):
    """When a job was queued at a station, sent to a worker, run, and collected; seconds, monotonic."""

    station: str
    since: float
    sent: float
    began: float
    ended: float
    back: float
    rows: int


class Visit(msgspec.Struct, eq=False):
    """A job's call at one station: the tensors that it brings, in the order of the stage's inputs.

    Tensors that came in as bytes and are still bytes are given as a tuple of them.
    `key` is equal for visits that may share a batch. `alone` is set after a crash: a suspect runs by itself.
    `finish` takes the outputs; a stream has its answers taken one by one by `part`, and `finish` ends it.
    A visit of a `sequence` goes to the worker that holds the sequence's state.
    """

    job: Job
    arrays: Sequence[Any]
    rows: int
    finish: Callable[[Visit, list[Array]], None]
    values: dict[str, Value]
    key: Hashable = None
    leg: Any = None
    order: int = 0
    since: float = 0.0
    crashes: int = 0
    alone: bool = False
    part: Callable[[Visit, list[Array]], None] | None = None
    sequence: str = ""


class Dispatch:
    """The visits that wait for one station. `max_batch` counts rows; a visit never has more than that."""

    def __init__(self, *, max_batch: int, max_wait: float = 0.0) -> None:
        self.max_batch = max_batch
        self.max_wait = max_wait
        self.rows = 0
        self.dropped: list[Visit] = []
        self._lanes: dict[tuple[int, Hashable], deque[Visit]] = {}
        self._order = 0

    def __iter__(self) -> Iterator[Visit]:
        for lane in self._lanes.values():
            yield from lane

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def put(self, visit: Visit) -> None:
        """Queue a visit. Raises ValueError for one that no batch can hold."""
        if visit.rows > self.max_batch:
            raise ValueError(f"{visit.rows} rows do not fit into a batch of {self.max_batch}")
        visit.order = self._order = self._order + 1
        name = (visit.job.priority, visit.key)
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = deque()
        lane.append(visit)
        self.rows += visit.rows

    def put_back(self, visit: Visit) -> None:
        """Queue a visit that was taken before, ahead of those that came after it."""
        self._lanes.setdefault((visit.job.priority, visit.key), deque()).appendleft(visit)
        self.rows += visit.rows

    def ready_at(self) -> float:
        """When the next batch may leave: the past if there is enough, FOREVER if nothing waits."""
        if not self._lanes:
            return FOREVER
        if not self.max_wait or self.rows >= self.max_batch:
            return 0.0
        return min(lane[0].since for lane in self._lanes.values()) + self.max_wait

    def take(self, now: float, *, limit: int = 0) -> list[Visit]:
        """The next batch: visits of one lane, at most `max_batch` rows (or `limit`, though always one visit).

        Visits that were answered meanwhile vanish; those that expired are put aside in `dropped`.
        """
        limit = min(limit, self.max_batch) if limit else self.max_batch
        while self._lanes:
            name = self._first()
            lane = self._lanes[name]
            batch = self._fill(lane, now, limit)
            if not lane:
                del self._lanes[name]
            if batch:
                return batch
        return []

    def _first(self) -> tuple[int, Hashable]:
        lanes = self._lanes
        if len(lanes) == 1:
            return next(iter(lanes))
        return min(lanes, key=lambda name: (name[0], lanes[name][0].order))

    def _fill(self, lane: deque[Visit], now: float, limit: int) -> list[Visit]:
        batch: list[Visit] = []
        room = limit
        while lane:
            visit = lane[0]
            job = visit.job
            if job.done or job.deadline <= now:
                lane.popleft()
                self.rows -= visit.rows
                if not job.done:
                    self.dropped.append(visit)
                continue
            if batch and (visit.rows > room or visit.alone):
                break
            lane.popleft()
            self.rows -= visit.rows
            batch.append(visit)
            room -= visit.rows
            if visit.alone or room <= 0:
                break
        return batch

    def clear(self) -> list[Visit]:
        """Take everything out, in no order."""
        found = list(self)
        self._lanes.clear()
        self.rows = 0
        return found


class Door:
    """Counts the rows and bytes that are on a line, and turns away what would be too much."""

    __slots__ = ("jobs", "max_bytes", "max_rows", "rows", "size")

    def __init__(self, *, max_rows: int, max_bytes: int) -> None:
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self.jobs = 0
        self.rows = 0
        self.size = 0

    def enter(self, job: Job) -> None:
        """Count a job in. Raises Busy when it does not fit; an empty line takes any job."""
        rows, size = self.rows + job.rows, self.size + job.size
        if self.jobs and (rows > self.max_rows or size > self.max_bytes):
            raise Busy(
                f"the line is full: {self.rows} rows and {self.size / 2**20:.1f} MiB are on it",
                hint=f"it holds {self.max_rows} rows and {self.max_bytes / 2**20:.0f} MiB; try again later",
            )
        self.jobs += 1
        self.rows = rows
        self.size = size

    def leave(self, job: Job) -> None:
        """Count a job out."""
        self.jobs -= 1
        self.rows -= job.rows
        self.size -= job.size

    def leave_together(self, jobs: int, rows: int, size: int) -> None:
        """Count several jobs out."""
        self.jobs -= jobs
        self.rows -= rows
        self.size -= size
