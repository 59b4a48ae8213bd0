"""A contest: each contestant lives in a process of its own, and all are timed in turns, round by round.

A process of its own keeps the thread pools of one library from disturbing the next; turns keep the noise of the
machine from picking the winner: it hits all contestants of a round alike, and ratios are taken within a round.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from torchship import hardware, process


class Failed(Exception):
    """A contestant could not be built, or broke while it ran."""


@dataclass
class Contestant:
    """One recipe in its process; `rounds` holds the median milliseconds of each round, by batch size."""

    name: str
    child: Any
    sock: socket.socket
    log: int
    agreement: dict[str, Any] = field(default_factory=dict)
    build_s: float = 0.0
    rounds: dict[int, list[float]] = field(default_factory=dict)

    def request(self, timeout: float, **question: Any) -> dict[str, Any]:
        """Ask the child and wait for its answer. Raises Failed with the last lines of its log."""
        self.sock.settimeout(timeout)
        try:
            self.sock.send(json.dumps(question).encode())
            line = self.sock.recv(2**16)
        except TimeoutError:
            raise Failed(f"no answer within {timeout:.0f} s") from None
        except OSError:
            line = b""
        if not line:
            raise Failed(self._death())
        found: dict[str, Any] = json.loads(line)
        if "fault" in found:
            raise Failed(found["fault"])
        return found

    def _death(self) -> str:
        self.child.wait(10)
        lines = process.tail(self.log).splitlines() or [""]
        return f"{process.describe_exit(self.child.returncode)}: {lines[-1]}"

    def median(self, batch: int) -> float:
        """Milliseconds a call, over all rounds."""
        return statistics.median(self.rounds[batch])

    def close(self) -> None:
        """End the process; may be called twice."""
        process.stop(self.child)
        self.sock.close()
        with contextlib.suppress(OSError):
            os.close(self.log)


def start(name: str, *, target: str, argument: dict[str, Any], threads: int) -> Contestant:
    """Start a contestant's process: `target(argument)` returns a Runner there."""
    log = os.memfd_create(f"contest-{name}")
    child, sock = process.converse(
        "benchmarks.contest:serve",
        argument={"target": target, "argument": argument, "subject": argument["model"]},
        output=log,
        threads=threads,
        cpus=hardware.cpus(threads),
    )
    return Contestant(name, child, sock, log)


def ready(contestant: Contestant, *, timeout: float) -> None:
    """Wait until it is built, and note how its outputs agree with the reference. Raises Failed."""
    found = contestant.request(timeout, do="build")
    contestant.build_s = found["seconds"]
    contestant.agreement = found["agreement"]


def race(contestants: Sequence[Contestant], *, batch: int, rounds: int, seconds: float) -> None:
    """Time all in turns; the order turns with each round. Raises Failed when one breaks."""
    for contestant in contestants:
        contestant.rounds[batch] = []
        contestant.request(300, do="warm", batch=batch)
    for number in range(rounds):
        shift = number % len(contestants)
        for contestant in (*contestants[shift:], *contestants[:shift]):
            contestant.rounds[batch].append(contestant.request(300, do="time", batch=batch, seconds=seconds)["ms"])


def ratio(slow: Contestant, fast: Contestant, batch: int) -> float:
    """How many times faster `fast` is: the median over the rounds of the ratio within a round."""
    pairs = zip(slow.rounds[batch], fast.rounds[batch], strict=True)
    return statistics.median(a / b for a, b in pairs)


def serve(spec: dict[str, Any], sock: socket.socket) -> None:
    """The child's side: build, then answer questions until the other side closes."""
    runner = None
    ready_inputs: dict[int, Any] = {}
    while line := sock.recv(2**16):
        question = json.loads(line)
        try:
            if question["do"] == "build":
                started = time.monotonic()
                runner = process.resolve(spec["target"])(spec["argument"])
                found = _checked(runner, spec, time.monotonic() - started)
            elif question["do"] == "warm":
                found = _warm(runner, spec["subject"], question["batch"], ready_inputs)
            else:
                found = _time(runner, ready_inputs[question["batch"]], question["seconds"])
        except Exception as fault:
            found = {"fault": f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}"}
        sock.send(json.dumps(found).encode())


def _checked(runner: Any, spec: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Outputs for 16 validation rows, compared with the eager ones that the first contestant left in the folder."""
    from benchmarks import subjects
    from benchmarks.hand_written import arrays

    path = Path(spec["argument"]["folder"]) / f"{spec['subject']}.reference.npy"
    batches = [subjects.batch(spec["subject"], 8, seed=seed) for seed in (1, 2, 3, 4)]
    got = np.concatenate([np.array(arrays(runner.call(runner.prepare(batch)))) for batch in batches])
    if not path.exists():
        np.save(path, got)
    return {"seconds": seconds, "agreement": agreement(np.load(path), got)}


def agreement(reference: Any, got: Any) -> Any:
    """The search's own Verdict, in plain data and not yet held to limits, on FP32 arrays with rows on axis 0."""
    import msgspec

    from torchship.optimize.judge import compare
    from torchship.optimize.yardstick import study
    from torchship.tensors import Free, Signature, TensorSpec

    rows = TensorSpec("y", "FP32", (Free(), *reference.shape[1:]))
    signature = Signature((TensorSpec("x", "FP32", (Free(), 1)),), (rows,), True)
    yards = study([{"y": reference}], signature=signature)
    return msgspec.to_builtins(compare([{"y": reference}], [{"y": got}], signature=signature, yards=yards))


def _warm(runner: Any, subject: str, batch: int, inputs: dict[int, Any]) -> dict[str, Any]:
    from benchmarks import subjects

    inputs[batch] = runner.prepare(subjects.batch(subject, batch, seed=7))
    until = time.monotonic() + 1.0
    for count in range(50):
        runner.call(inputs[batch])
        if count >= 4 and time.monotonic() > until:
            break
    return {}


def _time(runner: Any, inputs: Any, seconds: float) -> dict[str, Any]:
    taken: list[int] = []
    until = time.perf_counter_ns() + int(seconds * 1e9)
    runner.call(inputs)  # wakes the threads up
    while len(taken) < 3 or time.perf_counter_ns() < until:
        started = time.perf_counter_ns()
        runner.call(inputs)
        taken.append(time.perf_counter_ns() - started)
    return {"ms": statistics.median(taken) / 1e6}
