"""Measures an open stage: latency percentiles and throughput by batch size, until more rows bring no more speed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from torchship.artifact.manifest import BatchPoint
from torchship.stage import Stage
from torchship.tensors import Tensors


class Effort(msgspec.Struct, frozen=True):
    """How long to measure: seconds and calls for each point, and the largest batch that is tried.

    `longest`: no further batch size is tried when its fewest calls would take more seconds than this.
    """

    seconds: float = 0.8
    calls: int = 200
    fewest: int = 5
    warm_up: float = 0.5
    max_batch: int = 1024
    longest: float = 6.0


def batch_sizes(limit: int) -> list[int]:
    """1, 2, 4, 8 ... up to `limit`."""
    return [2**power for power in range(20) if 2**power <= max(limit, 1)]


def resized(tensors: Tensors, *, rows: int) -> Tensors:
    """`tensors` with exactly `rows` rows, repeated from the start as needed."""
    return {name: np.take(array, np.arange(rows) % array.shape[0], axis=0) for name, array in tensors.items()}


def warm_up(stage: Stage, tensors: Tensors, *, seconds: float) -> None:
    """Call until two runs of five calls take equally long within 5 %, for at most `seconds` (at least two calls)."""
    end = time.perf_counter() + seconds
    before = 0.0
    stage(tensors)
    while True:
        started = time.perf_counter()
        calls = 0
        while calls < 5:
            stage(tensors)
            calls += 1
            if time.perf_counter() > end:
                return
        now = (time.perf_counter() - started) / calls
        if before and abs(now - before) < 0.05 * before:
            return
        before = now


def sample(stage: Stage, tensors: Tensors, *, effort: Effort) -> list[float]:
    """Seconds of single calls, after warming up."""
    warm_up(stage, tensors, seconds=effort.warm_up)
    found: list[float] = []
    end = time.perf_counter() + effort.seconds
    while len(found) < effort.calls and (len(found) < effort.fewest or time.perf_counter() < end):
        started = time.perf_counter()
        stage(tensors)
        found.append(time.perf_counter() - started)
    return found


def point(seconds: list[float], *, batch: int) -> BatchPoint:
    """The percentiles of sampled calls of `batch` rows; throughput is what the mean call gives."""
    p50, p90, p99 = (float(np.percentile(seconds, share)) * 1e3 for share in (50, 90, 99))
    return BatchPoint(batch, p50, p90, p99, batch / float(np.mean(seconds)))


def curve(
    stage: Stage, tensors: Tensors, *, batched: bool, effort: Effort, after: tuple[BatchPoint, ...] = ()
) -> Iterator[BatchPoint]:
    """Points for batch 1, 2, 4 ... until throughput grows by less than 3 % twice in a row, 8 at least where allowed.

    Points that were measured before are given by `after`, and not measured or yielded again.
    """
    known = {found.batch: found for found in after}
    sizes = batch_sizes(min(effort.max_batch, stage.max_batch or effort.max_batch)) if batched else [1]
    best, flat = 0.0, 0
    for size in sizes:
        found = known.get(size)
        if found is None:
            rows = resized(tensors, rows=size) if batched else tensors
            found = point(sample(stage, rows, effort=effort), batch=size)
            yield found
        flat = 0 if found.rows_per_s > best * 1.03 else flat + 1
        best = max(best, found.rows_per_s)
        slow = found.p50_ms / 1e3 * 2 * (effort.fewest + 2) > effort.longest
        if size >= 8 and (flat >= 2 or slow):
            return


def peak_memory() -> int:
    """Largest resident size of this process since it started, in bytes.

    Read from the kernel's own counter for this program: `ru_maxrss` would inherit the parent's peak across exec.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
