"""Measures open stages: one by itself, by batch size, until more rows bring no more speed; or several in turns."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from torchship import hardware, process
from torchship.artifact import open_artifact
from torchship.artifact.manifest import BatchPoint
from torchship.stage import Stage
from torchship.tensors import Tensors


class Effort(msgspec.Struct, frozen=True):
    """How long to measure: seconds and calls for each point, and the largest batch that is tried.

    Batches of several rows have half of the seconds. `longest`: no further batch size is tried when its fewest calls
    would take more seconds than this.
    """

    seconds: float = 0.8
    calls: int = 200
    fewest: int = 5
    warm_up: float = 0.5
    max_batch: int = 1024
    longest: float = 6.0


SERVING_BATCH = 8  # memory is what serving up to this many rows at once takes
_ROUNDS = 7
_TURN = Effort(seconds=0.25, calls=200, fewest=2, warm_up=0.02)
_OPENING = 120.0  # seconds
_SILENCE = 60.0
_MESSAGE = 2**16  # bytes; a turn has at most 200 samples


def resized(tensors: Tensors, *, rows: int) -> Tensors:
    """`tensors` with exactly `rows` rows, repeated from the start as needed."""
    return {name: np.take(array, np.arange(rows) % array.shape[0], axis=0) for name, array in tensors.items()}


def warm_up(stage: Stage, tensors: Tensors, *, seconds: float) -> None:
    """Call until two runs of five calls take equally long within 5 %, for at most `seconds` (at least two calls)."""
    if (settle := getattr(stage, "settle", None)) is not None:
        settle()
    end = time.perf_counter() + seconds
    before = 0.0
    stage(tensors)
    while True:
        started = time.perf_counter()
        for _ in range(5):
            stage(tensors)
            if time.perf_counter() > end:
                return
        now = (time.perf_counter() - started) / 5
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


def curve(stage: Stage, tensors: Tensors, *, batched: bool, effort: Effort) -> Iterator[BatchPoint]:
    """Points for batch 1, 2, 4 ... until throughput grows by less than 3 % twice in a row, 8 at least where allowed.

    Each is measured when it is asked for: 1 and 8 first, which tell most; then what lies between, and beyond.
    """
    limit = max(1, min(effort.max_batch, stage.max_batch or effort.max_batch)) if batched else 1
    several = msgspec.structs.replace(effort, seconds=effort.seconds / 2, warm_up=effort.warm_up / 2)
    points: list[BatchPoint] = []
    sizes = [size for size in (1, SERVING_BATCH, 2, 4) if size <= limit]
    for size in sizes:
        rows = resized(tensors, rows=size) if batched else tensors
        points.append(point(sample(stage, rows, effort=effort if size == 1 else several), batch=size))
        yield points[-1]
        points.sort(key=lambda found: found.batch)
        last = points[-1]
        slow = last.p50_ms / 1e3 * 2 * (effort.fewest + 2) > effort.longest
        if size == sizes[-1] and SERVING_BATCH <= last.batch <= limit // 2 and not slow and _grows(points):
            sizes.append(last.batch * 2)


def _grows(points: Sequence[BatchPoint]) -> bool:
    """Whether one of the last two batch sizes brought 3 % more rows a second than all before it."""
    best, flat = 0.0, 0
    for found in points:
        flat = 0 if found.rows_per_s > best * 1.03 else flat + 1
        best = max(best, found.rows_per_s)
    return flat < 2


def peak_memory() -> int:
    """Largest resident size of this process since it started, in bytes.

    Read from the kernel's own counter for this program: `ru_maxrss` would inherit the parent's peak across exec.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def interleaved(
    contestants: Sequence[tuple[Path, int]], *, device: str, threads: int, deadline: float = float("inf")
) -> list[list[float]]:
    """Seconds of single calls for each artifact at its batch size; none for one that fails or is late.

    Each is open and warm in a fresh process, and has a turn of a quarter of a second in each of seven rounds: what
    disturbs the machine then disturbs all alike, so that their ratios hold where single figures do not. `deadline` is
    on the monotonic clock.
    """
    with ExitStack() as stack:
        socks = []
        for path, batch in contestants:
            child, sock = process.converse(
                "torchship.optimize.measure:contest_here",
                argument=[str(path), batch, device, threads],
                output=subprocess.DEVNULL,
                threads=threads,
                cpus=hardware.cpus(threads),
            )
            stack.callback(sock.close)
            stack.callback(process.stop, child)
            socks.append(sock)
        opened = [_answer(sock, min(deadline, time.monotonic() + _OPENING)) is not None for sock in socks]
        found: list[list[float]] = [[] for _ in socks]
        for _ in range(_ROUNDS):
            for sock, ready, seconds in zip(socks, opened, found, strict=True):
                if ready:
                    seconds.extend(_answer(sock, time.monotonic() + _SILENCE, sign=b".") or [])
            if time.monotonic() > deadline:
                break
        return found


def _answer(sock: socket.socket, deadline: float, *, sign: bytes = b"") -> list[float] | None:
    """One message from the child, after the `sign` if there is one; None when it died or took too long."""
    try:
        if sign:
            sock.send(sign)
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        message = sock.recv(_MESSAGE)
    except OSError:
        return None
    return msgspec.json.decode(message, type=list[float]) if message else None


def contest_here(argument: Any, sock: socket.socket) -> None:
    """The child's side: open, warm up, say so; then run for a moment at each sign."""
    path, batch, device, threads = argument
    artifact = open_artifact(path, verify=False)
    stage = artifact.open(device=device, threads=threads, trust=True)
    tensors: Tensors = artifact.inputs()
    if artifact.manifest.signature.batched:
        tensors = resized(tensors, rows=batch)
    warm_up(stage, tensors, seconds=0.5)
    sock.send(b"[]")
    while sock.recv(1):
        sock.send(msgspec.json.encode(sample(stage, tensors, effort=_TURN)))
