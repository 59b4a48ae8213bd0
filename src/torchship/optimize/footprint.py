"""What a whole fresh server of an artifact takes in memory under load, and the largest batch that keeps to a limit."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchship import process
from torchship.artifact import open_artifact
from torchship.artifact.manifest import ServedMemory
from torchship.client import Client
from torchship.errors import TorchshipError, Unavailable
from torchship.optimize.measure import SERVING_BATCH, resized

_NAME = "m"
_BATCHES = (1, 2, 4, SERVING_BATCH)
_CALLS = 10  # requests of the largest batch; what is allocated lazily has come by then
_PAUSE = 0.02  # seconds between two looks
_EQUAL = 1.03  # without a limit, a larger batch may take so many times what one row takes


def fitted(folder: Path, *, limit: int | None, threads: int, one_process: bool, timeout: float) -> ServedMemory:
    """The largest batch up to 8 rows that keeps to `limit` bytes, or about what a single row takes, and its peak.

    Where a single row takes more than the limit, its figures. Raises Unavailable when the server does not start or
    answer within `timeout` seconds.
    """
    batched = open_artifact(folder, verify=False).manifest.signature.batched
    deadline = time.monotonic() + timeout
    found: list[ServedMemory] = []
    for most in _BATCHES if batched else _BATCHES[:1]:
        left = deadline - time.monotonic()
        if found and left < timeout / 4:
            break
        peak = served(folder, most=most, threads=threads, one_process=one_process, timeout=max(left, 1.0))
        if found and peak > (limit or found[0].peak * _EQUAL):
            break
        found.append(ServedMemory(peak=peak, max_batch=most, one_process=one_process))
        if limit and peak > limit:
            break
    return found[-1]


def served(folder: Path, *, most: int, threads: int, one_process: bool, timeout: float) -> int:
    """Peak memory in bytes of a fresh server, all its processes, from its start until it has answered requests of 8
    rows, which run in batches of `most`. Raises Unavailable."""
    artifact = open_artifact(folder, verify=False)
    rows = SERVING_BATCH if artifact.manifest.signature.batched else 0
    model = {"name": _NAME, "artifact": str(folder), "threads": threads, "max_batch": most, "trust": True}
    config = {"one_process": one_process, "http": {"port": 0}, "model": [model]}
    with _watched(config, threads=threads) as (child, log, peak):
        url = _url(child, log, timeout=timeout)
        tensors = resized(artifact.inputs(), rows=rows) if rows else artifact.inputs()
        client = Client(url)
        try:
            for _ in range(_CALLS):
                client.infer(_NAME, tensors, timeout=timeout)
        except TorchshipError as fault:
            raise Unavailable(f"the server fails under load: {fault.line}") from None
        finally:
            client.close()
    return max(peak)


@contextmanager
def _watched(config: object, *, threads: int) -> Iterator[tuple[subprocess.Popen[bytes], int, list[int]]]:
    """A server in a process of its own, the descriptor of its log, and what it holds, look by look."""
    log = os.memfd_create("torchship-server-log")
    child = process.spawn("torchship.serve.host:serve", argument=config, output=log, threads=threads)
    seen, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(_PAUSE):
            seen.append(process.held(child.pid))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield child, log, seen
    finally:
        done.set()
        looking.join()
        process.stop(child, grace=5.0)
        os.close(log)


def _url(child: subprocess.Popen[bytes], log: int, *, timeout: float) -> str:
    """Where the server listens, as soon as it says so."""
    deadline = time.monotonic() + timeout
    while True:
        words = process.tail(log)
        if found := re.search(rf"serving {_NAME} at (http://\S+?)/v2/", words):
            return found[1]
        if child.poll() is not None or time.monotonic() > deadline:
            last = words.splitlines()[-1:] or [process.describe_exit(child.poll() or 0)]
            raise Unavailable(f"its server does not start: {last[0][:300]}")
        time.sleep(_PAUSE)
