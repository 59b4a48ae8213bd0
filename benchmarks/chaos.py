"""kill -9 of a worker every second under load: no request may be lost, and none may get another's answer.

    python -m benchmarks.chaos [--seconds 60] [--callers 16]

A pipeline of two stages with two workers each is served by a process of its own. Every caller sends numbers that nobody
else sends and checks what comes back. A clear 503 is an answer (it says: try again); silence, another status or
another's numbers are not.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
import msgspec
import numpy as np
import psutil
import uvloop

from torchship.stage import stage
from torchship.tensors import Array

ROOT = Path(__file__).parents[1]
CONFIG = """
[[model]]
name = "chaos"
stages = [
    {run = "benchmarks.chaos:double", copies = 2},
    {run = "benchmarks.chaos:increment", copies = 2, inputs = {x = "y"}},
]
"""


@stage("x:FP64[-1,4] -> y:FP64[-1,4]", batched=True, max_batch=16)
def double(x: Array) -> Array:
    """Takes a millisecond, so that a kill finds it at work."""
    time.sleep(0.001)
    return x * 2


@stage("x:FP64[-1,4] -> z:FP64[-1,4]", batched=True, max_batch=16)
def increment(x: Array) -> Array:
    """The second station."""
    time.sleep(0.001)
    return x + 1


class Tally(msgspec.Struct):
    """What the callers saw."""

    sent: int = 0
    answered: int = 0
    refused: int = 0
    crossed: int = 0
    kills: int = 0
    others: Counter[str] = msgspec.field(default_factory=Counter)


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> tuple[int, bytes]:
    """One request on a kept connection."""
    head = f"POST /v2/models/chaos/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    found = re.search(rb"content-length: (\d+)", answer)
    assert found, answer
    return int(answer[9:12]), await reader.readexactly(int(found[1]))


async def caller(number: int, *, port: int, until: float, tally: Tally) -> None:
    """Send rows of 1 to 5 that only this caller sends, and check every answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    count = 0
    while time.monotonic() < until:
        count += 1
        rows = random.randint(1, 5)
        x = np.arange(rows * 4, dtype=np.float64).reshape(rows, 4) + number * 1e9 + count * 100
        given = {"name": "x", "shape": [rows, 4], "datatype": "FP64", "data": x.ravel().tolist()}
        tally.sent += 1
        async with asyncio.timeout(60):
            status, body = await post(reader, writer, msgspec.json.encode({"inputs": [given]}))
        if status == 503:
            tally.refused += 1
            await asyncio.sleep(0.05)
        elif status == 200:
            tally.answered += 1
            found = np.array(msgspec.json.decode(body)["outputs"][0]["data"]).reshape(rows, 4)
            tally.crossed += not np.array_equal(found, x * 2 + 1)
        else:
            tally.others[f"{status} {body[:200]!r}"] += 1
    writer.close()


async def killer(host: psutil.Process, *, every: float, until: float, tally: Tally) -> None:
    """kill -9 of one worker after the other."""
    while time.monotonic() < until - every:
        await asyncio.sleep(every)
        workers = host.children()
        if workers:
            os.kill(random.choice(workers).pid, signal.SIGKILL)
            tally.kills += 1


async def storm(port: int, host: psutil.Process, *, seconds: float, callers: int, every: float) -> Tally:
    """Load and kills together."""
    tally = Tally()
    until = time.monotonic() + seconds
    work = [caller(number, port=port, until=until, tally=tally) for number in range(callers)]
    await asyncio.gather(*work, killer(host, every=every, until=until, tally=tally))
    return tally


def leftovers(before: set[str]) -> set[str]:
    """What appeared in the folders for shared memory and temporary files and has our name in it."""
    return {
        name for folder in ("/dev/shm", "/tmp") for name in os.listdir(folder) if "torchship-arena" in name
    } - before


@click.command()
@click.option("--seconds", default=60.0, help="How long.")
@click.option("--callers", default=16, help="Connections.")
@click.option("--every", default=1.0, help="Seconds between two kills.")
def main(*, seconds: float, callers: int, every: float) -> None:
    """Run the storm, print what was seen, and the line for machines; exit code 1 when anything was lost."""
    before = leftovers(set())
    with tempfile.TemporaryDirectory(prefix="torchship-chaos-") as folder:
        config = Path(folder) / "serve.toml"
        config.write_text(CONFIG)
        words = [sys.executable, "-m", "torchship", "serve", str(config), "--http-port", "0"]
        server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert server.stderr is not None
        port = next(int(found[1]) for line in server.stderr if (found := re.search(r"127\.0\.0\.1:(\d+)/", line)))
        quiet = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        host = psutil.Process(server.pid)
        try:
            tally = uvloop.run(storm(port, host, seconds=seconds, callers=callers, every=every))
            workers = host.children()
        finally:
            server.terminate()
            code = server.wait(30)
            quiet.wait(10)
    orphans = [worker.pid for worker in workers if worker.is_running()]
    lost = tally.sent - tally.answered - tally.refused
    print(f"refused with 503: {tally.refused}; other answers: {dict(tally.others) or 'none'}")
    print(f"server's exit code: {code}; orphans: {orphans or 'none'}; leftovers: {leftovers(before) or 'none'}")
    print(f"sent={tally.sent} answered={tally.answered} lost={lost} crossed={tally.crossed} kills={tally.kills}")
    sys.exit(bool(lost or tally.crossed or orphans or code))


if __name__ == "__main__":
    main()
