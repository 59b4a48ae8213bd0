"""A load generator for a served model: closed loop by concurrency, open loop by Poisson arrivals, and a search for the
load that a latency target allows.

In the open loop a latency counts from the moment the request was due, not from when it could be sent, so that a
server that stalls cannot hide it (coordinated omission, as described by Gil Tene).
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeAlias

import msgspec
import numpy as np

from torchship.client.address import Address, caller_context
from torchship.client.clients import AsyncClient
from torchship.client.lanes import GrpcCalls, HttpCalls, Lane, OnAnswer
from torchship.errors import BadInput, Unavailable
from torchship.tensors import Array, Tensors, bytes_array, dtype_name, numpy_dtype
from torchship.wire import oip_grpc, oip_json
from torchship.wire.json_arrays import encode_json_data
from torchship.wire.messages import Request

Check: TypeAlias = Callable[[bytes], bool] | None
_INFER = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(slots=True)
class CallOutcome:
    """What a run of `kind` closed or open measured under a load; latencies in seconds, of good answers only."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    late: int = 0  # open loop: requests that were still unanswered at the end
    load: str = ""
    kind: str = "closed"

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    def percentile(self, percent: float) -> float:
        """A percentile of the latency in seconds (NaN without answers)."""
        return float(np.percentile(self.latencies, percent)) if self.latencies else float("nan")

    def meets(self, *, percent: float, limit: float) -> bool:
        """Whether there was no fault and the percentile is within `limit` seconds."""
        return bool(self.latencies) and not self.faults and not self.late and self.percentile(percent) <= limit

    def plain(self) -> dict[str, Any]:
        """The load and the figures as JSON: rate, latencies in milliseconds, faults by kind."""
        run = {"load": self.load, "kind": self.kind, "rate": self.rate, "answers": len(self.latencies)}
        millis = {f"p{percent}_ms": self.percentile(percent) * 1e3 for percent in (50, 90, 99, 99.9)}
        faults = {"faults": sum(self.faults.values()), "fault_kinds": dict(self.faults), "unanswered": self.late}
        return {**run, "seconds": self.seconds, **millis, **faults}


class _Run:
    """Book-keeping of one run over lanes."""

    def __init__(self, payload: bytes, load: str, kind: str, check: Check = None) -> None:
        self.outcome = CallOutcome(load=load, kind=kind)
        self.payload, self.check = payload, check
        self.lanes: list[Lane] = []
        self.due: dict[Lane, float] = {}
        self.counting = False
        self.stopped = False

    def fire(self, lane: Lane, due: float) -> None:
        """Send a request, which was due at that moment."""
        self.due[lane] = due
        lane.fire(self.payload)

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

    def stop(self) -> None:
        """Hang up."""
        self.stopped = True
        for lane in self.lanes:
            lane.close()


async def closed_loop(
    target: Target, payload: bytes, *, concurrency: int, seconds: float, warm_up: float = 0.5, check: Check = None
) -> CallOutcome:
    """`concurrency` callers, each sending its next request as soon as its last was answered.

    `check` says of the body of a good answer whether it is right. Raises Unavailable where nobody listens.
    """
    run = _Run(payload, f"{concurrency} callers", "closed", check)

    def on_answer(lane: Lane, fault: str, body: bytes) -> None:
        now = perf_counter()
        if run.count(lane, fault, body, now):
            run.fire(lane, now)

    run.lanes = await target.connect(concurrency, on_answer)
    try:
        for lane in run.lanes:
            run.fire(lane, perf_counter())
        await asyncio.sleep(warm_up)
        start, run.counting = perf_counter(), True
        await asyncio.sleep(seconds)
        run.counting, run.outcome.seconds = False, perf_counter() - start
    finally:
        run.stop()
    return run.outcome


async def open_loop(
    target: Target, payload: bytes, *, rate: float, seconds: float, lanes: int = 64, patience: float = 5.0
) -> CallOutcome:
    """Requests that are due at Poisson-distributed moments, `rate` a second, whatever the server does.

    A request that finds all lanes busy waits, and its latency counts the wait. After the last one, answers are
    awaited for `patience` seconds; those that are missing then are `late`. Raises Unavailable where nobody listens.
    """
    run = _Run(payload, f"{rate:g}/s", "open")
    run.counting = True
    gaps = np.random.default_rng(0).exponential(1 / rate, max(1, round(rate * seconds)))
    waiting: deque[float] = deque()
    idle: list[Lane] = []

    def on_answer(lane: Lane, fault: str, body: bytes) -> None:
        if not run.count(lane, fault, body, perf_counter()):
            return
        if waiting:
            run.fire(lane, waiting.popleft())
        else:
            idle.append(lane)

    run.lanes = await target.connect(lanes, on_answer)
    idle += run.lanes
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
        run.stop()
    return run.outcome


@dataclass(frozen=True, slots=True)
class Target:
    """A model on a server, and how it is asked: `encoding` is binary, json or grpc."""

    address: Address
    model: str
    encoding: str = "binary"
    token: str = ""
    tls: ssl.SSLContext | None = None

    async def connect(self, count: int, on_answer: OnAnswer) -> list[Lane]:
        """`count` lanes to it. Raises Unavailable where nobody listens."""
        where, grpc = self.address, self.encoding == "grpc"
        tls = (self.tls or caller_context()) if where.secure else None
        if tls is not None:
            tls.set_alpn_protocols(["h2" if grpc else "http/1.1"])

        def make() -> Lane:
            scheme = "https" if tls else "http"
            given = {"path": _INFER, "authority": where.netloc, "scheme": scheme, "token": self.token}
            return Lane(GrpcCalls(**given) if grpc else HttpCalls(), on_answer)

        connect = asyncio.get_running_loop().create_connection
        try:
            return [(await connect(make, where.host, where.port, ssl=tls))[1] for _ in range(count)]
        except OSError as fault:
            raise Unavailable(f"cannot connect to {where.netloc}: {fault.strerror}", hint="is it serving?") from None

    def payload(self, tensors: Tensors) -> bytes:
        """The bytes of one request: all of it over HTTP, the message of a call of gRPC."""
        request = Request(self.model, tensors)
        if self.encoding == "grpc":
            return oip_grpc.encode_request(request)
        if self.encoding == "json":
            inputs = [
                {"name": n, "shape": list(a.shape), "datatype": dtype_name(a.dtype), "data": encode_json_data(a)}
                for n, a in tensors.items()
            ]
            body, headers = msgspec.json.encode({"inputs": inputs}), "Content-Type: application/json\r\n"
        else:
            body, length = oip_json.encode_request(request)
            headers = f"Inference-Header-Content-Length: {length}\r\nContent-Type: application/octet-stream\r\n"
        headers += f"Authorization: Bearer {self.token}\r\n" if self.token else ""
        first = f"POST /v2/models/{self.model}/infer HTTP/1.1\r\nHost: {self.address.host}\r\n"
        return f"{first}{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def example(target: Target, *, rows: int = 1, file: bytes | None = None, free: int = 1) -> dict[str, Array]:
    """Random inputs of the model's shapes; `file` fills its BYTES input. One answer is awaited, to see that they fit.

    `rows` is the length of axis 0 where that is free, `free` that of the other free axes.
    Raises BadInput where a BYTES input has no file, and whatever the server says.
    """
    async with AsyncClient(target.address.server, token=target.token, tls=target.tls) as client:
        metadata = await client.metadata(target.model)
        random = np.random.default_rng(0)
        tensors: dict[str, Array] = {}
        for item in metadata["inputs"]:
            name, datatype = item["name"], item["datatype"]
            shape = [axis if axis >= 0 else (rows if place == 0 else free) for place, axis in enumerate(item["shape"])]
            if datatype == "BYTES":
                if file is None:
                    raise BadInput(f"input {name!r} takes BYTES", hint="give a file: --input cat.jpg")
                tensors[name] = bytes_array([file] * math.prod(shape)).reshape(shape)
            elif datatype.startswith(("FP", "BF")):
                tensors[name] = random.random(shape).astype(numpy_dtype(datatype))
            else:
                most = 2 if datatype == "BOOL" else 100
                tensors[name] = random.integers(0, most, shape).astype(numpy_dtype(datatype))
        await client.infer(target.model, tensors)
        return tensors


async def sweep(
    target: Target,
    payload: bytes,
    *,
    percent: float,
    limit: float,
    seconds: float,
    warm_up: float = 0.5,
    most: int = 512,
) -> AsyncIterator[CallOutcome]:
    """Doubles the callers until the latency target breaks or nothing is gained, then searches the highest open rate.

    The rate is halved in on seven times: the last good run is within one percent of what the target allows.
    """
    best, callers = 0.0, 1
    while callers <= most:
        run = await closed_loop(target, payload, concurrency=callers, seconds=seconds, warm_up=warm_up)
        yield run
        gained = run.rate > best * 1.05
        best = max(best, run.rate)
        if not run.meets(percent=percent, limit=limit) or not gained:
            break
        callers *= 2
    low, high = 0.0, best
    for _ in range(7):
        rate = (low + high) / 2 if low else high / 2
        run = await open_loop(target, payload, rate=max(rate, 1.0), seconds=seconds)
        run.load = f"{rate:.0f}/s"
        yield run
        if run.meets(percent=percent, limit=limit):
            low = rate
        else:
            high = rate
        if high - low < 0.02 * high or high < 2:
            break
