"""A load generator for a served model: closed loop by concurrency, open loop by Poisson arrivals, and a search for the
load that a latency target allows.

In the open loop a latency counts from the moment the request was due, not from when it could be sent, so that a
server that stalls cannot hide it (coordinated omission, as described by Gil Tene).
"""

from __future__ import annotations

import asyncio
import itertools
import math
import ssl
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import msgspec
import numpy as np

from torchship.client.address import Address, caller_context
from torchship.client.clients import AsyncClient
from torchship.client.lanes import Connect, Lane, grpc_lanes, http_lanes, http_request
from torchship.errors import BadInput
from torchship.tensors import Array, Tensors, bytes_array, dtype_name, numpy_dtype
from torchship.wire import oip_grpc, oip_json
from torchship.wire.json_arrays import encode_json_data
from torchship.wire.messages import Request


@dataclass(frozen=True, slots=True)
class Shot:
    """What is sent, in turn: whole HTTP/1.1 requests, or the messages of gRPC calls.

    `check` looks at the body of an answer with status 200 and returns whether it is right.
    """

    payloads: Sequence[bytes]
    check: Callable[[bytes], bool] | None = None


@dataclass(slots=True)
class CallOutcome:
    """What a run measured; latencies in seconds, of good answers only."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    late: int = 0  # open loop: requests that were still unanswered at the end

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    def percentile(self, percent: float) -> float:
        """A percentile of the latency in seconds (NaN without answers)."""
        return float(np.percentile(self.latencies, percent)) if self.latencies else float("nan")

    def summary(self) -> dict[str, Any]:
        """The figures as plain data: rate, latencies in milliseconds, faults by kind."""
        millis = {f"p{percent}_ms": self.percentile(percent) * 1e3 for percent in (50, 90, 99, 99.9)}
        faults = {"faults": sum(self.faults.values()), "fault_kinds": dict(self.faults), "unanswered": self.late}
        return {"rate": self.rate, "answers": len(self.latencies), "seconds": self.seconds, **millis, **faults}


class _Run:
    """Book-keeping of one run over lanes."""

    def __init__(self, shot: Shot) -> None:
        self.outcome = CallOutcome()
        self.payloads = itertools.cycle(shot.payloads)
        self.check = shot.check
        self.due: dict[Lane, float] = {}
        self.counting = False
        self.stopped = False

    def fire(self, lane: Lane, due: float) -> None:
        """Send the next request, which was due at that moment."""
        self.due[lane] = due
        lane.fire(next(self.payloads))

    def count(self, lane: Lane, fault: str, body: bytes, now: float) -> bool:
        """Count an answer; whether its lane can go on."""
        began = self.due.pop(lane, None)
        if began is not None and self.counting:
            if not fault and self.check is not None and not self.check(body):
                fault = "wrong answer"
            if fault:
                self.outcome.faults[fault] += 1
            else:
                self.outcome.latencies.append(now - began)
        return fault != "disconnected" and not self.stopped

    def stop(self, lanes: Sequence[Lane]) -> None:
        """Hang up."""
        self.stopped = True
        for lane in lanes:
            lane.close()


async def closed_loop(
    shot: Shot, *, connect: Connect, concurrency: int, seconds: float, warm_up: float = 0.5
) -> CallOutcome:
    """`concurrency` callers, each sending its next request as soon as its last was answered.

    Raises Unavailable where nobody listens.
    """
    run = _Run(shot)

    def on_answer(lane: Lane, fault: str, body: bytes) -> None:
        now = perf_counter()
        if run.count(lane, fault, body, now):
            run.fire(lane, now)

    lanes: list[Lane] = [await connect(on_answer) for _ in range(concurrency)]
    try:
        for lane in lanes:
            run.fire(lane, perf_counter())
        await asyncio.sleep(warm_up)
        start, run.counting = perf_counter(), True
        await asyncio.sleep(seconds)
        run.counting, run.outcome.seconds = False, perf_counter() - start
    finally:
        run.stop(lanes)
    return run.outcome


async def open_loop(
    shot: Shot, *, connect: Connect, rate: float, seconds: float, lanes: int = 64, seed: int = 0, patience: float = 5.0
) -> CallOutcome:
    """Requests that are due at Poisson-distributed moments, `rate` a second, whatever the server does.

    A request that finds all lanes busy waits, and its latency counts the wait. After the last one, answers are
    awaited for `patience` seconds; those that are missing then are `late`.
    """
    run = _Run(shot)
    run.counting = True
    gaps = np.random.default_rng(seed).exponential(1 / rate, max(1, round(rate * seconds)))
    waiting: deque[float] = deque()
    idle: list[Lane] = []

    def on_answer(lane: Lane, fault: str, body: bytes) -> None:
        if not run.count(lane, fault, body, perf_counter()):
            return
        if waiting:
            run.fire(lane, waiting.popleft())
        else:
            idle.append(lane)

    everyone = [await connect(on_answer) for _ in range(lanes)]
    idle.extend(everyone)
    start = perf_counter()
    try:
        for due in np.cumsum(gaps).tolist():
            while (wait := start + due - perf_counter()) > 0:  # noqa: ASYNC110  (time is what is waited for)
                await asyncio.sleep(wait if wait > 0.002 else 0)
            if idle:
                run.fire(idle.pop(), start + due)
            else:
                waiting.append(start + due)
        end = perf_counter() + patience
        while (run.due or waiting) and perf_counter() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        run.outcome.seconds = perf_counter() - start
        run.outcome.late = len(run.due) + len(waiting)
    finally:
        run.stop(everyone)
    return run.outcome


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: the load that was put on, and what came of it."""

    load: str
    kind: str
    outcome: CallOutcome

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {"load": self.load, "kind": self.kind, **self.outcome.summary()}


@dataclass(frozen=True, slots=True)
class Target:
    """A model on a server, and how it is asked: `encoding` is binary, json or grpc."""

    address: Address
    model: str
    encoding: str = "binary"
    token: str = ""
    tls: ssl.SSLContext | None = None

    def connect(self) -> Connect:
        """Opens lanes to it."""
        host, port = self.address.host, self.address.port
        tls = (self.tls or caller_context()) if self.address.secure else None
        if self.encoding == "grpc":
            return grpc_lanes(host, port=port, token=self.token, tls=tls)
        return http_lanes(host, port=port, tls=tls)

    def shot(self, tensors: Tensors) -> Shot:
        """The bytes of one request."""
        request = Request(self.model, tensors)
        if self.encoding == "grpc":
            return Shot([oip_grpc.encode_request(request)])
        headers = [("Authorization", f"Bearer {self.token}")] if self.token else []
        if self.encoding == "json":
            inputs = [
                {"name": n, "shape": list(a.shape), "datatype": dtype_name(a.dtype), "data": encode_json_data(a)}
                for n, a in tensors.items()
            ]
            body = msgspec.json.encode({"inputs": inputs})
            headers.append(("Content-Type", "application/json"))
        else:
            body, length = oip_json.encode_request(request)
            headers.append(("Inference-Header-Content-Length", str(length)))
            headers.append(("Content-Type", "application/octet-stream"))
        return Shot([http_request(f"/v2/models/{self.model}/infer", body, host=self.address.host, headers=headers)])


async def example(target: Target, *, rows: int = 1, file: bytes | None = None, free: int = 1) -> dict[str, Array]:
    """Random inputs of the model's shapes; `file` fills its BYTES input. One answer is awaited, to see that they fit.

    `rows` is the length of axis 0 where that is free, `free` that of the other free axes.
    Raises BadInput where a BYTES input has no file, and whatever the server says.
    """
    async with AsyncClient(target.address.server, token=target.token, tls=target.tls) as client:
        metadata = await client.metadata(target.model)
        random = np.random.default_rng(0)
        tensors = {}
        for item in metadata["inputs"]:
            shape = [axis if axis >= 0 else (rows if place == 0 else free) for place, axis in enumerate(item["shape"])]
            tensors[item["name"]] = _fill(item["name"], item["datatype"], shape, random, file)
        await client.infer(target.model, tensors)
        return tensors


def _fill(name: str, datatype: str, shape: list[int], random: np.random.Generator, file: bytes | None) -> Array:
    if datatype == "BYTES":
        if file is None:
            raise BadInput(f"input {name!r} takes BYTES", hint="give a file: --input cat.jpg")
        return bytes_array([file] * math.prod(shape)).reshape(shape)
    if datatype == "BOOL":
        return random.integers(0, 2, shape).astype(np.bool_)
    if datatype.startswith(("FP", "BF")):
        return random.random(shape).astype(numpy_dtype(datatype))
    return random.integers(0, 100, shape).astype(numpy_dtype(datatype))


async def by_concurrency(
    target: Target, shot: Shot, *, callers: Sequence[int], seconds: float, warm_up: float
) -> AsyncIterator[Row]:
    """One closed-loop run for each number of callers."""
    for count in callers:
        outcome = await closed_loop(shot, connect=target.connect(), concurrency=count, seconds=seconds, warm_up=warm_up)
        yield Row(f"{count} callers", "closed", outcome)


async def by_rate(
    target: Target, shot: Shot, *, rates: Sequence[float], seconds: float, lanes: int
) -> AsyncIterator[Row]:
    """One open-loop run for each rate of Poisson arrivals."""
    for rate in rates:
        outcome = await open_loop(shot, connect=target.connect(), rate=rate, seconds=seconds, lanes=lanes)
        yield Row(f"{rate:g}/s", "open", outcome)


def meets(row: Row, *, percent: float, limit: float) -> bool:
    """Whether a run had no fault and its percentile is within `limit` seconds."""
    outcome = row.outcome
    return bool(outcome.latencies) and not outcome.faults and not outcome.late and outcome.percentile(percent) <= limit


async def sweep(
    target: Target, shot: Shot, *, percent: float, limit: float, seconds: float, warm_up: float = 0.5, most: int = 512
) -> AsyncIterator[Row]:
    """Doubles the callers until the latency target breaks or nothing is gained, then searches the highest open rate.

    The rate is halved in on seven times: the last good row is within one percent of what the target allows.
    """
    best, callers = 0.0, 1
    while callers <= most:
        async for row in by_concurrency(target, shot, callers=[callers], seconds=seconds, warm_up=warm_up):
            yield row
        gained = row.outcome.rate > best * 1.05
        best = max(best, row.outcome.rate)
        if not meets(row, percent=percent, limit=limit) or not gained:
            break
        callers *= 2
    low, high = 0.0, best
    for _ in range(7):
        rate = (low + high) / 2 if low else high / 2
        outcome = await open_loop(shot, connect=target.connect(), rate=max(rate, 1.0), seconds=seconds)
        row = Row(f"{rate:.0f}/s", "open", outcome)
        yield row
        if meets(row, percent=percent, limit=limit):
            low = rate
        else:
            high = rate
        if high - low < 0.02 * high or high < 2:
            break
