"""A load generator: prebuilt requests on raw sockets, closed loop by concurrency or open loop by Poisson arrivals.

In the open loop a latency counts from the moment the request was due, not from when it could be sent, so that a
server that stalls cannot hide it (coordinated omission, as described by Gil Tene).
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol, cast

import numpy as np

from torchship.errors import Unavailable


@dataclass(frozen=True, slots=True)
class Shot:
    """What is sent, in turn: whole HTTP/1.1 requests, or gRPC calls made by `client.load_grpc`.

    `check` looks at the body of an answer with status 200 and returns whether it is right.
    """

    payloads: Sequence[bytes]
    check: Callable[[bytes], bool] | None = None


@dataclass(slots=True)
class Outcome:
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


class Lane(Protocol):
    """One connection with at most one request under way."""

    def fire(self, payload: bytes) -> None:
        """Send a request; the run is told when its answer has come."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


Landed = Callable[[Lane, str, bytes], None]  # "" or the kind of fault, and the body
Connect = Callable[[Landed], Any]  # a coroutine function that opens a Lane


class HttpLane(asyncio.Protocol):
    """An HTTP/1.1 connection that reads just enough: status, Content-Length and the body."""

    def __init__(self, landed: Landed) -> None:
        self._landed = landed
        self._buffer = b""
        self._parts: list[bytes] = []
        self._have = 0
        self._end = 0  # of the answer, once its head is there
        self._start = 0
        self._status = b""
        self._transport: asyncio.Transport | None = None
        self._open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """A server that hangs up fails the request that is under way."""
        if self._open:
            self._open = False
            self._landed(self, "disconnected", b"")

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer."""
        if self._buffer or self._parts:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._end:
                return
            data = b"".join((self._buffer, *self._parts))
            self._parts.clear()
        self._buffer = buffer = data
        self._have = len(buffer)
        if not self._end:
            top = buffer.find(b"\r\n\r\n")
            if top < 0:
                return
            head = buffer[:top].lower()
            self._status = head[9:12]
            place = head.find(b"\r\ncontent-length:")
            if place < 0:
                self._landed(self, "no Content-Length", b"")
                return
            stop = head.find(b"\r\n", place + 2)
            self._start = top + 4
            self._end = self._start + int(head[place + 17 : stop if stop > 0 else top])
        if len(buffer) >= self._end:
            body = buffer[self._start : self._end]
            self._buffer = buffer[self._end :]
            self._have = len(self._buffer)
            self._end = 0
            self._landed(self, "" if self._status == b"200" else f"status {self._status.decode()}", body)

    def fire(self, payload: bytes) -> None:
        """Send one request."""
        if not self._open or self._transport is None:
            asyncio.get_running_loop().call_soon(self._landed, self, "disconnected", b"")
            return
        self._transport.write(payload)

    def close(self) -> None:
        """Hang up."""
        self._open = False
        if self._transport is not None:
            self._transport.abort()


def http_lanes(host: str, *, port: int, tls: ssl.SSLContext | None = None) -> Connect:
    """Opens HTTP/1.1 lanes to an address."""

    async def connect(landed: Landed) -> Lane:
        try:
            loop = asyncio.get_running_loop()
            _, lane = await loop.create_connection(lambda: HttpLane(landed), host, port, ssl=tls)
        except OSError as fault:
            raise Unavailable(f"cannot connect to {host}:{port}: {fault.strerror}", hint="is it serving?") from None
        return lane

    return connect


class _Run:
    """Book-keeping of one run over lanes."""

    def __init__(self, shot: Shot) -> None:
        self.outcome = Outcome()
        self.payloads = itertools.cycle(shot.payloads)
        self.check = shot.check
        self.due: dict[Lane, float] = {}
        self.counting = False
        self.stopped = False

    def land(self, lane: Lane, fault: str, body: bytes, now: float) -> None:
        began = self.due.pop(lane, None)
        if began is None or not self.counting:
            return
        if not fault and self.check is not None and not self.check(body):
            fault = "wrong answer"
        if fault:
            self.outcome.faults[fault] += 1
        else:
            self.outcome.latencies.append(now - began)


async def closed_loop(
    shot: Shot, *, connect: Connect, concurrency: int, seconds: float, warm_up: float = 0.5
) -> Outcome:
    """`concurrency` callers, each sending its next request as soon as its last was answered.

    Raises Unavailable where nobody listens.
    """
    run = _Run(shot)

    def landed(lane: Lane, fault: str, body: bytes) -> None:
        now = perf_counter()
        run.land(lane, fault, body, now)
        if not run.stopped and fault != "disconnected":
            run.due[lane] = now
            lane.fire(next(run.payloads))

    lanes: list[Lane] = [await connect(landed) for _ in range(concurrency)]
    try:
        for lane in lanes:
            run.due[lane] = perf_counter()
            lane.fire(next(run.payloads))
        await asyncio.sleep(warm_up)
        start, run.counting = perf_counter(), True
        await asyncio.sleep(seconds)
        run.counting, run.outcome.seconds = False, perf_counter() - start
    finally:
        run.stopped = True
        for lane in lanes:
            lane.close()
    return run.outcome


async def open_loop(
    shot: Shot, *, connect: Connect, rate: float, seconds: float, lanes: int = 64, seed: int = 0, patience: float = 5.0
) -> Outcome:
    """Requests that are due at Poisson-distributed moments, `rate` a second, whatever the server does.

    A request that finds all lanes busy waits, and its latency counts the wait. After the last one, answers are
    awaited for `patience` seconds; those that are missing then are `late`.
    """
    run = _Run(shot)
    run.counting = True
    gaps = np.random.default_rng(seed).exponential(1 / rate, max(1, round(rate * seconds)))
    waiting: deque[float] = deque()
    idle: list[Lane] = []

    def landed(lane: Lane, fault: str, body: bytes) -> None:
        run.land(lane, fault, body, perf_counter())
        if fault == "disconnected" or run.stopped:
            return
        if waiting:
            run.due[lane] = waiting.popleft()
            lane.fire(next(run.payloads))
        else:
            idle.append(lane)

    idle.extend([await connect(landed) for _ in range(lanes)])
    everyone = list(idle)
    start = perf_counter()
    try:
        for due in np.cumsum(gaps).tolist():
            while (wait := start + due - perf_counter()) > 0:  # noqa: ASYNC110  (time is what is waited for)
                await asyncio.sleep(wait if wait > 0.002 else 0)
            if idle:
                lane = idle.pop()
                run.due[lane] = start + due
                lane.fire(next(run.payloads))
            else:
                waiting.append(start + due)
        end = perf_counter() + patience
        while (run.due or waiting) and perf_counter() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        run.outcome.seconds = perf_counter() - start
        run.outcome.late = len(run.due) + len(waiting)
    finally:
        run.stopped = True
        for lane in everyone:
            lane.close()
    return run.outcome


def http_request(path: str, body: bytes, *, host: str = "localhost", headers: Sequence[tuple[str, str]] = ()) -> bytes:
    """The bytes of a POST."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in (*headers, ("Content-Length", str(len(body)))))
    return f"POST {path} HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n".encode() + body
