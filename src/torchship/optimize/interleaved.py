"""An interleaved benchmark: several artifacts, each open and warm in a fresh process, run one at a time.

What disturbs the machine then disturbs all alike, so that their ratios hold where single figures do not.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from torchship import hardware, process

_ROUNDS = 7
_TURN = 0.25
_OPENING = 120.0
_SILENCE = 60.0
_MESSAGE = 2**16  # bytes; a turn has at most 200 samples


class Contest(msgspec.Struct, frozen=True):
    """What a contestant is told at its start."""

    artifact: str
    batch: int
    device: str
    threads: int
    seconds: float


@dataclass
class Contestant:
    """One waiting child and its samples."""

    sock: socket.socket
    seconds: list[float] = field(default_factory=list)


def measure(
    contestants: Sequence[tuple[Path, int]], *, device: str, threads: int, deadline: float = float("inf")
) -> list[list[float]]:
    """Seconds of single calls for each artifact at its batch size; none for one that fails or is late.

    `deadline` is on the monotonic clock. Each has a turn of a quarter of a second in each of seven rounds.
    """
    with ExitStack() as stack:
        waiting = [_start(path, batch, device, threads, stack) for path, batch in contestants]
        opened = [_answer(contestant, min(deadline, time.monotonic() + _OPENING)) is not None for contestant in waiting]
        for _ in range(_ROUNDS):
            for contestant, ready in zip(waiting, opened, strict=True):
                if ready:
                    _take_turn(contestant)
            if time.monotonic() > deadline:
                break
        return [contestant.seconds for contestant in waiting]


def _start(path: Path, batch: int, device: str, threads: int, stack: ExitStack) -> Contestant:
    child, sock = process.converse(
        "torchship.optimize.interleaved:contest_here",
        argument=msgspec.to_builtins(Contest(str(path), batch, device, threads, _TURN)),
        output=subprocess.DEVNULL,
        threads=threads,
        cpus=hardware.cpus(threads),
    )
    stack.callback(sock.close)
    stack.callback(process.stop, child)
    return Contestant(sock)


def _take_turn(contestant: Contestant) -> None:
    try:
        contestant.sock.send(b".")
    except OSError:
        return
    contestant.seconds += _answer(contestant, time.monotonic() + _SILENCE) or []


def _answer(contestant: Contestant, deadline: float) -> list[float] | None:
    """One message from the child; None when it died or took too long."""
    contestant.sock.settimeout(max(0.001, deadline - time.monotonic()))
    try:
        message = contestant.sock.recv(_MESSAGE)
    except OSError:
        return None
    return msgspec.json.decode(message, type=list[float]) if message else None


def contest_here(argument: Any, sock: socket.socket) -> None:
    """The child's side: open, warm up, say so; then run for a moment at each sign."""
    from torchship.artifact import open_artifact
    from torchship.optimize.measure import Effort, resized, sample, warm_up

    contest = msgspec.convert(argument, Contest)
    artifact = open_artifact(Path(contest.artifact), verify=False)
    stage = artifact.open(device=contest.device, threads=contest.threads, trust=True)
    tensors = artifact.inputs()
    if artifact.manifest.signature.batched:
        tensors = dict(resized(tensors, rows=contest.batch))
    warm_up(stage, tensors, seconds=0.5)
    effort = Effort(seconds=contest.seconds, calls=200, fewest=2, warm_up=0.02)
    sock.send(b"[]")
    while sock.recv(1):
        sock.send(msgspec.json.encode(sample(stage, tensors, effort=effort)))
