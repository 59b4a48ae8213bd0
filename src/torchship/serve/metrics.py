"""What is counted about a line: plain numbers, added up in the host only, since every job carries its own clock; and
the memory of the server."""

from __future__ import annotations

import asyncio
import logging
import os
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

from torchship import process

_log = logging.getLogger("torchship.serve")
BUCKETS_MS = (0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0)
_BUCKETS = [bound / 1e3 for bound in BUCKETS_MS]
_EVERY = 10.0  # seconds between two looks at memory, each of which costs some milliseconds


@dataclass(slots=True)
class BatchMeter:
    """Calls with one batch size: how many, and their seconds of writing inputs, running, and collecting outputs."""

    calls: int = 0
    packing: float = 0.0
    running: float = 0.0
    passing: float = 0.0


@dataclass(slots=True)
class StationMeter:
    """One station since its start. Durations are sums over jobs, in seconds."""

    jobs: int = 0
    rows: int = 0
    calls: int = 0
    queued: float = 0.0
    packing: float = 0.0
    running: float = 0.0
    passing: float = 0.0
    restarts: int = 0
    batches: dict[int, BatchMeter] = field(default_factory=dict)

    def count(self, jobs: int, rows: int, calls: int, queued: float, shared: tuple[float, float, float]) -> None:
        """Count what came back in one message: `queued` is a sum over the jobs, `shared` the seconds of writing inputs,
        running, and collecting outputs."""
        packing, running, passing = shared
        self.jobs += jobs
        self.rows += rows
        self.calls += calls
        self.queued += queued
        self.packing += jobs * packing
        self.running += jobs * running
        self.passing += jobs * passing
        batch = self.batches.get(rows // calls)
        if batch is None:
            batch = self.batches[rows // calls] = BatchMeter()
        batch.calls += calls
        batch.packing += packing
        batch.running += running
        batch.passing += passing


@dataclass(slots=True)
class LineMeter:
    """One version of a model since its start. `failures` by reason, as Triton names them; durations in seconds."""

    success: int = 0
    rows: int = 0
    seconds: float = 0.0
    failed_seconds: float = 0.0
    last: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)
    histogram: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_MS) + 1))
    _marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=5))

    def mark(self, now: float) -> None:
        """Remember how far it is: once a second, for `seconds_for`."""
        self._marks.append((now, self.rows))

    def seconds_for(self, rows: int, now: float) -> float:
        """How long so many rows will take, at the rate of the last five seconds; 1 where nothing is known."""
        since, before = self._marks[0] if self._marks else (now, self.rows)
        done = self.rows - before
        return min(60.0, rows * (now - since) / done) if done else max(1.0, now - since)

    @property
    def failed(self) -> int:
        """All failures together."""
        return sum(self.failures.values())

    def succeeded(self, rows: list[int], seconds: list[float], now: float) -> None:
        """Count answered requests: the rows of each, and how long it took."""
        self.last = now
        self.success += len(rows)
        self.rows += sum(rows)
        self.seconds += sum(seconds)
        histogram = self.histogram
        for duration in seconds:
            histogram[bisect_left(_BUCKETS, duration)] += 1

    def lost(self, reason: str, seconds: float) -> None:
        """Count one request without an answer; reason is REJECTED, CANCELED, BACKEND or OTHER."""
        self.failures[reason] = self.failures.get(reason, 0) + 1
        self.failed_seconds += seconds


class PeakMemory:
    """The most bytes that this server has held, all its processes together; 0 before the first look.

    `expected` is what was measured when the models were made, 0 where that is not known.
    """

    def __init__(self) -> None:
        self.now = self.most = self.expected = 0
        self._warned = False

    async def watch(self) -> None:
        """Look again and again, beside the event loop. Runs until it is cancelled."""
        while True:
            self.now = await asyncio.to_thread(process.held, os.getpid())
            self.most = max(self.most, self.now)
            if self.expected and self.most > 1.1 * self.expected and not self._warned:
                self._warned = True
                words = f"{self.most / 1e6:.1f} MB are held, {self.expected / 1e6:.1f} MB were measured"
                _log.warning("memory: %s when the models were made", words)
            await asyncio.sleep(_EVERY)


peak = PeakMemory()  # of this process and its children, as the kernel's counters are
