"""Dispatch: the queue in front of a station, and which calls make the next batch; pure, without clocks or sockets.

Batches form by themselves while the workers are busy: whoever becomes free takes what waits, so `max_wait` is 0
unless asked for. Visits whose shapes or parameters differ wait in lanes of their own, since they cannot be joined.
A lower priority number goes first; within one, the longest waiting lane goes first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import msgspec

from torchship.errors import Expired, TorchshipError
from torchship.stage import Value
from torchship.tensors import Array, Tensors

FOREVER = float("inf")


class Job(msgspec.Struct, eq=False):
    """One request on its way through a line, with its own clock (seconds, monotonic).

    `tensors` holds everything known so far, at the end the outputs; `reply` is called once, with `fault` set when
    there is no answer. `gone` tells whether the caller has left; `waiting` and `left` count the stations ahead.
    `asked` is the time-out that the request itself has given. While a stage streams, `on_taken` lets it make one more
    answer, and `on_dropped` ends it.
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
    asked: float = 0.0
    on_taken: Callable[[], None] | None = None
    on_dropped: Callable[[], None] | None = None

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


class StageCall(msgspec.Struct, eq=False):
    """A job's call at one station: the tensors that it brings, in the order of the stage's inputs.

    An optional input that the job does not bring is None there. Tensors that came in as bytes and are still bytes are
    given as a tuple of them.
    `key` is equal for calls that may share a batch. `alone` is set after a crash: a suspect runs by itself.
    `finish` takes the outputs; a stream has its answers taken one by one by `part`, and `finish` ends it.
    A call of a `sequence` goes to the worker that holds the sequence's state.
    """

    job: Job
    arrays: Sequence[Any]
    rows: int
    finish: Callable[[StageCall, list[Array]], None]
    values: dict[str, Value]
    key: Hashable = None
    node: Any = None
    order: int = 0
    since: float = 0.0
    crashes: int = 0
    alone: bool = False
    part: Callable[[StageCall, list[Array]], None] | None = None
    sequence: str = ""


class Dispatch:
    """The calls that wait for one station. `max_batch` counts rows; a call never has more than that."""

    def __init__(self, *, max_batch: int, max_wait: float = 0.0) -> None:
        self.max_batch = max_batch
        self.max_wait = max_wait
        self.rows = 0
        self.dropped: list[StageCall] = []
        self._lanes: dict[tuple[int, Hashable], deque[StageCall]] = {}
        self._order = 0

    def __iter__(self) -> Iterator[StageCall]:
        for lane in self._lanes.values():
            yield from lane

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def put(self, call: StageCall) -> None:
        """Queue a call."""
        call.order = self._order = self._order + 1
        name = (call.job.priority, call.key)
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = deque()
        lane.append(call)
        self.rows += call.rows

    def put_back(self, call: StageCall) -> None:
        """Queue a call that was taken before, ahead of those that came after it."""
        self._lanes.setdefault((call.job.priority, call.key), deque()).appendleft(call)
        self.rows += call.rows

    def ready_at(self) -> float:
        """When the next batch may leave: the past if there is enough, FOREVER if nothing waits."""
        if not self._lanes:
            return FOREVER
        if not self.max_wait or self.rows >= self.max_batch:
            return 0.0
        return min(lane[0].since for lane in self._lanes.values()) + self.max_wait

    def take(self, now: float, *, limit: int = 0) -> list[StageCall]:
        """The next batch: calls of one lane, at most `max_batch` rows (or `limit`, though always one call).

        Visits that were answered meanwhile vanish; those that expired are put aside in `dropped`.
        """
        limit = min(limit, self.max_batch) if limit else self.max_batch
        while self._lanes:
            lanes = self._lanes
            if len(lanes) == 1:
                name = next(iter(lanes))
            else:
                name = min(lanes, key=lambda name: (name[0], lanes[name][0].order))
            lane = lanes[name]
            batch = self._fill(lane, now, limit)
            if not lane:
                del self._lanes[name]
            if batch:
                return batch
        return []

    def _fill(self, lane: deque[StageCall], now: float, limit: int) -> list[StageCall]:
        batch: list[StageCall] = []
        room = limit
        while lane:
            call = lane[0]
            job = call.job
            if job.done or job.deadline <= now:
                lane.popleft()
                self.rows -= call.rows
                if not job.done:
                    self.dropped.append(call)
                continue
            if batch and (call.rows > room or call.alone):
                break
            lane.popleft()
            self.rows -= call.rows
            batch.append(call)
            room -= call.rows
            if call.alone or room <= 0:
                break
        return batch

    def clear(self) -> list[StageCall]:
        """Take everything out, in no order."""
        found = list(self)
        self._lanes.clear()
        self.rows = 0
        return found
