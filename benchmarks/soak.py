"""Hours of use in minutes: memory and file descriptors of a server must stay where they are.

    python -m benchmarks.soak [--minutes 10]

Steady callers by HTTP and gRPC, callers who come and go, who leave before their answer, who send nonsense, a stream, a
worker that is killed and a model that is reloaded now and then, and a look at metrics and statistics. Flat means: the
medians of the second and the last fifth of the time differ by at most 2 %, or 4 MiB, and not by a single descriptor.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import click
import numpy as np
import psutil
import uvloop

from benchmarks.callers import Running, Tally, caller, numbers, pipeline, post, serving
from torchship.client import AsyncClient
from torchship.errors import Unavailable
from torchship.stage import stage
from torchship.tensors import Array

CONFIG = f"""
[control]
repository = true
{pipeline("soaked", copies=1)}
[[model]]
name = "counted"
run = "benchmarks.soak:count"
"""


@stage("n:INT32[1] -> i:INT32[1]")
def count(n: Array) -> Iterator[Array]:
    """A stream: as many answers as it is asked for."""
    for number in range(int(n[0])):
        yield np.array([number], np.int32)


class Sample(NamedTuple):
    """The host at one moment, in MiB and descriptors; its workers are new now and then."""

    memory: float
    descriptors: int


async def grpc_caller(number: int, *, port: int, until: float, tally: Tally, pause: float) -> None:
    """Ask by gRPC, and read a stream now and then."""
    async with AsyncClient(f"grpc://127.0.0.1:{port}") as client:
        turn = 0
        while time.monotonic() < until:
            turn += 1
            x = numbers(number, turn)
            tally.sent += 1
            try:
                found = (await client.infer("soaked", {"x": x}))["z"]
            except Unavailable:
                tally.refused += 1
            else:
                tally.answered += 1
                tally.crossed += not np.array_equal(found, x * 2 + 1)
            if not turn % 20:
                answers = client.stream("counted", {"n": np.array([5], np.int32)})
                seen = [int(answer["i"][0]) async for answer in answers]
                assert seen == list(range(5)), seen
            await asyncio.sleep(pause)


async def stranger(port: int, *, until: float) -> None:
    """Connections that come and go: nonsense, half a body, an answer that nobody reads, a look at the metrics."""
    body = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP64","data":[1,2,3,4]}]}'
    head = b"POST /v2/models/soaked/infer HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    pieces = [
        head + body, head + body[:20], head.replace(b"POST", b"P\0ST") + body, head + body[:-5] + b"}}}}}",
        b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /v2/models/stats HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /v2/models/none%d HTTP/1.1\r\nhost: x\r\n\r\n" % random.getrandbits(60),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + random.randbytes(40), random.randbytes(200),
    ]  # fmt: skip
    while time.monotonic() < until:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(random.choice(pieces))
        with suppress(OSError, TimeoutError):
            if random.random() < 0.7:
                async with asyncio.timeout(0.05):
                    await reader.read(100)
        writer.close()
        await asyncio.sleep(0.01)


async def warden(server: Running, *, until: float) -> int:
    """Every ten seconds a reload or a kill -9; how many."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    turns = 0
    while time.monotonic() < until - 11:
        await asyncio.sleep(10)
        turns += 1
        if turns % 2:
            status, body = await post(reader, writer, "/v2/repository/models/soaked/load", b"{}")
            assert status == 200, body
        elif workers := server.host.children():
            os.kill(random.choice(workers).pid, signal.SIGKILL)
    writer.close()
    return turns


async def observer(host: psutil.Process, *, until: float, samples: list[Sample]) -> None:
    """Once a second."""
    while time.monotonic() < until - 1:
        samples.append(Sample(host.memory_info().rss / 2**20, host.num_fds()))
        await asyncio.sleep(1)


async def soak(server: Running, *, seconds: float, callers: int, pause: float) -> tuple[Tally, list[Sample], int]:
    """All of them together."""
    tally, samples, port = Tally(), list[Sample](), server.port
    until = time.monotonic() + seconds
    one = partial(caller, port=port, model="soaked", until=until, tally=tally, pause=pause)
    other = partial(grpc_caller, port=port, until=until, tally=tally, pause=pause)
    work = [*map(one, range(callers)), *map(other, range(100, 100 + callers))]
    work += [stranger(port, until=until) for _ in range(2)]
    work.append(observer(server.host, until=until, samples=samples))
    guarding = asyncio.ensure_future(warden(server, until=until))
    await asyncio.gather(guarding, *work)
    return tally, samples, guarding.result()


@click.command()
@click.option("--minutes", default=10.0, help="How long.")
@click.option("--callers", default=4, help="Steady callers by HTTP, and as many by gRPC.")
@click.option("--pause", default=0.01, help="Seconds between an answer and the caller's next request.")
def main(*, minutes: float, callers: int, pause: float) -> None:
    """Soak, print what was seen, and the line for machines; exit code 1 when anything grew or was lost."""
    with serving(CONFIG) as server:
        tally, samples, turns = uvloop.run(soak(server, seconds=minutes * 60, callers=callers, pause=pause))
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    first, last = (statistics.median(one.memory for one in part) for part in (early, late))
    fds_first, fds_last = (round(statistics.median(one.descriptors for one in part)) for part in (early, late))
    print(f"refused with 503: {tally.refused}; other answers: {dict(tally.others) or 'none'}; turns: {turns}")
    print(
        f"minutes={minutes:g} sent={tally.sent} answered={tally.answered} lost={tally.lost} crossed={tally.crossed}"
        f" memory_first_mb={first:.1f} memory_last_mb={last:.1f} fds_first={fds_first} fds_last={fds_last}"
    )
    grew = last > max(first * 1.02, first + 4) or fds_last > fds_first
    sys.exit(bool(tally.lost or tally.crossed or grew))


if __name__ == "__main__":
    main()
