"""The rematch: candidates that race closely are measured again in turns, so that noise does not pick the winner.

Each racer waits in a fresh process of its own, opened and warm; in every round each of them runs for a moment while
the others sleep. What disturbs the machine then disturbs all alike.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from torchship import process
from torchship.artifact import folder as folders
from torchship.artifact.manifest import BatchPoint, Timing
from torchship.optimize.cache import digest
from torchship.optimize.choose import Choice, Goal, cost
from torchship.optimize.measure import point
from torchship.optimize.race import Course
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe

_CLOSE = 1.15
_MOST_RACERS = 4
_ROUNDS = 7
_TURN = 0.25


class Turn(msgspec.Struct, frozen=True):
    """What a racer is told at its start."""

    artifact: str
    batch: int
    device: str
    threads: int
    go: int
    answer: int
    seconds: float


@dataclass
class Racer:
    """One waiting child and its samples."""

    place: int
    child: subprocess.Popen[bytes]
    go: int
    answer: int
    seconds: list[float] = field(default_factory=list)
    rest: bytes = b""


def racers(trials: Sequence[Trial], choice: Choice, *, goal: Goal) -> list[int]:
    """Places of the trials to measure again: those within 15 % of the best, four at most, and plain eager. Pure.

    Nobody when the goal is no speed or only one candidate is near.
    """
    if goal not in ("latency", "throughput") or not choice.ranking:
        return []
    prices = {place: _price(trials[place], goal) for place in choice.ranking}
    best = min(prices.values())
    close = [place for place in choice.ranking if prices[place] <= best * _CLOSE][:_MOST_RACERS]
    if len(close) < 2:
        return []
    eager = next((place for place in choice.ranking if trials[place].recipe == Recipe("eager")), None)
    return close if eager is None or eager in close else [*close, eager]


def _price(trial: Trial, goal: Goal) -> float:
    assert trial.timing is not None  # noqa: S101  # only ranked trials come here
    return cost(trial.timing, goal=goal)


def run(trials: Sequence[Trial], choice: Choice, *, course: Course, goal: Goal, deadline: float) -> list[Trial]:
    """The trials with the close racers' timing measured again; unchanged where there is nothing to settle."""
    places = racers(trials, choice, goal=goal)
    if not places or time.monotonic() > deadline:
        return list(trials)
    batches = {place: _batch(trials[place], goal) for place in places}
    key = digest([(trials[place].key, batches[place]) for place in places])
    known = course.cache.root / "rematches" / f"{key}.json"
    try:
        points = msgspec.json.decode(known.read_bytes(), type=dict[int, BatchPoint])
    except (FileNotFoundError, msgspec.MsgspecError):
        points = _measured(trials, batches, course, deadline)
        folders.write(known, msgspec.json.encode(points))
    return [
        _settled(trial, points[place], len(points)) if place in points else trial for place, trial in enumerate(trials)
    ]


def _batch(trial: Trial, goal: Goal) -> int:
    curve = trial.timing.curve if trial.timing else ()
    return curve[0].batch if goal == "latency" else max(curve, key=lambda found: found.rows_per_s).batch


def _settled(trial: Trial, found: BatchPoint, count: int) -> Trial:
    """The trial with one point of its curve replaced."""
    timing = trial.timing
    assert timing is not None  # noqa: S101  # only measured trials race
    curve = tuple(found if old.batch == found.batch else old for old in timing.curve)
    changed: Timing = msgspec.structs.replace(timing, curve=curve)
    note = f"batch {found.batch} was measured again in turns with {count - 1} others"
    return msgspec.structs.replace(trial, timing=changed, notes=(*trial.notes, note))


def _measured(
    trials: Sequence[Trial], batches: dict[int, int], course: Course, deadline: float
) -> dict[int, BatchPoint]:
    with ExitStack() as stack:
        waiting = [_start(place, trials[place], batch, course, stack) for place, batch in batches.items()]
        ready = [racer for racer in waiting if _answer(racer, min(deadline, time.monotonic() + 120)) is not None]
        for _ in range(_ROUNDS):
            for racer in ready:
                _take_turn(racer)
            if time.monotonic() > deadline:
                break
        return {r.place: point(r.seconds, batch=batches[r.place]) for r in ready if len(r.seconds) >= 5}


def _start(place: int, trial: Trial, batch: int, course: Course, stack: ExitStack) -> Racer:
    hear, go = os.pipe()
    answer, say = os.pipe()
    for descriptor in (go, answer):
        stack.callback(os.close, descriptor)
    turn = Turn(trial.artifact, batch, course.device, course.threads, hear, say, _TURN)
    child = process.spawn(
        "torchship.optimize.rematch:turns_here",
        argument=msgspec.to_builtins(turn),
        fds=(hear, say),
        output=subprocess.DEVNULL,
        threads=course.threads,
    )
    stack.callback(process.stop, child)
    os.close(hear)
    os.close(say)
    return Racer(place, child, go, answer)


def _take_turn(racer: Racer) -> None:
    try:
        os.write(racer.go, b".")
    except BrokenPipeError:
        return
    found = _answer(racer, time.monotonic() + 60)
    racer.seconds += found or []


def _answer(racer: Racer, deadline: float) -> list[float] | None:
    """One line from the child; None when it died or took too long."""
    while b"\n" not in racer.rest:
        readable, _, _ = select.select([racer.answer], [], [], max(0.0, deadline - time.monotonic()))
        data = os.read(racer.answer, 65536) if readable else b""
        if not data:
            return None
        racer.rest += data
    line, _, racer.rest = racer.rest.partition(b"\n")
    return msgspec.json.decode(line, type=list[float])


def turns_here(argument: Any) -> None:
    """The child's side: open, warm up, say so; then run for a moment at each sign."""
    from torchship.artifact import open_artifact
    from torchship.optimize.measure import Effort, resized, sample, warm_up

    turn = msgspec.convert(argument, Turn)
    artifact = open_artifact(Path(turn.artifact), verify=False)
    stage = artifact.open(device=turn.device, threads=turn.threads, trust=True)
    tensors = artifact.inputs()
    if artifact.manifest.signature.batched:
        tensors = dict(resized(tensors, rows=turn.batch))
    warm_up(stage, tensors, seconds=0.5)
    effort = Effort(seconds=turn.seconds, calls=200, fewest=2, warm_up=0.02)
    os.write(turn.answer, b"[]\n")
    while os.read(turn.go, 1):
        os.write(turn.answer, msgspec.json.encode(sample(stage, tensors, effort=effort)) + b"\n")
