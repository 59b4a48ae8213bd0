"""A server in a process of its own, and callers who send numbers that nobody else sends and check what comes back.

A clear 503 is an answer (it says: try again); silence, another status or another's numbers are not. A connection that
is cut tells its caller at once: where receivers are killed, that is counted, and the caller connects again.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import psutil

from torchship.stage import stage
from torchship.tensors import Array

ROOT = Path(__file__).parents[1]


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


def pipeline(name: str, *, copies: int) -> str:
    """A `[[model]]` of both stages, which makes 2x + 1."""
    return f"""
[[model]]
name = "{name}"
stages = [
    {{run = "benchmarks.callers:double", copies = {copies}}},
    {{run = "benchmarks.callers:increment", copies = {copies}, inputs = {{x = "y"}}}},
]
"""


class Tally(msgspec.Struct):
    """What the callers saw."""

    sent: int = 0
    answered: int = 0
    refused: int = 0
    cut: int = 0
    crossed: int = 0
    others: Counter[str] = msgspec.field(default_factory=Counter)

    @property
    def lost(self) -> int:
        """What was neither answered, nor clearly refused, nor cut off with its connection."""
        return self.sent - self.answered - self.refused - self.cut


class Running(NamedTuple):
    """A server: its port and its process."""

    port: int
    host: psutil.Process


@contextmanager
def serving(config: str) -> Iterator[Running]:
    """A server with this configuration on a free port. Exits the program where it, or a worker, does not end well."""
    before = leftovers()
    with tempfile.TemporaryDirectory(prefix="torchship-bench-") as folder:
        file = Path(folder) / "serve.toml"
        file.write_text(config)
        words = [sys.executable, "-m", "torchship", "serve", str(file), "--http-port", "0"]
        server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert server.stderr is not None
        port = next(int(found[1]) for line in server.stderr if (found := re.search(r"127\.0\.0\.1:(\d+)/", line)))
        quiet = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        workers: list[psutil.Process] = []
        try:
            yield Running(port, psutil.Process(server.pid))
            workers = psutil.Process(server.pid).children()
        finally:
            server.terminate()
            code = server.wait(30)
            quiet.wait(10)
    orphans = [worker.pid for worker in workers if worker.is_running()]
    left = leftovers() - before
    print(f"server's exit code: {code}; orphans: {orphans or 'none'}; leftovers: {left or 'none'}")
    if code or orphans or left:
        sys.exit(1)


def leftovers() -> set[str]:
    """What is in the folders for shared memory and temporary files and has our name in it."""
    return {
        f"{folder}/{name}"
        for folder in ("/dev/shm", "/tmp")
        for name in os.listdir(folder)
        if "torchship-arena" in name
    }


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: bytes) -> tuple[int, bytes]:
    """One request on a kept connection."""
    writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    found = re.search(rb"content-length: (\d+)", answer)
    assert found, answer
    return int(answer[9:12]), await reader.readexactly(int(found[1]))


def numbers(caller: int, count: int) -> Array:
    """1 to 5 rows that only this caller sends, and only now."""
    rows = random.randint(1, 5)
    return np.arange(rows * 4, dtype=np.float64).reshape(rows, 4) + caller * 1e9 + count * 100


async def caller(number: int, *, port: int, model: str, until: float, tally: Tally, pause: float = 0.0) -> None:
    """Ask, on one connection, until the time is over, and check every answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    count = 0
    while time.monotonic() < until:
        count += 1
        x = numbers(number, count)
        given = {"name": "x", "shape": list(x.shape), "datatype": "FP64", "data": x.ravel().tolist()}
        tally.sent += 1
        try:
            async with asyncio.timeout(60):
                body = msgspec.json.encode({"inputs": [given]})
                status, answer = await post(reader, writer, f"/v2/models/{model}/infer", body)
        except (ConnectionError, asyncio.IncompleteReadError):
            tally.cut += 1
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            continue
        if status == 503:
            tally.refused += 1
            await asyncio.sleep(0.05)
        elif status == 200:
            tally.answered += 1
            found = np.array(msgspec.json.decode(answer)["outputs"][0]["data"]).reshape(x.shape)
            tally.crossed += not np.array_equal(found, x * 2 + 1)
        else:
            tally.others[f"{status} {answer[:200]!r}"] += 1
        if pause:
            await asyncio.sleep(pause)
    writer.close()
