"""Rounds: children bring the patient up once and look at one part after another; who falls costs its own row only."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from torchship import process
from torchship.optimize.doctor import routes
from torchship.optimize.doctor.look import look
from torchship.optimize.doctor.patient import Case, Patient, admit

MODULE = "module"  # the look at the module itself; the other parts are routes
_ALARM = "killed by SIGALRM"


class Round(msgspec.Struct, frozen=True):
    """What a child is told: the parts in their order, the folder for its answers, and seconds for each part."""

    target: str
    inputs: tuple[str, ...]
    parts: tuple[str, ...]
    folder: str
    seconds: float


class _Answer(msgspec.Struct, frozen=True):
    value: Any
    seconds: float


def walk(
    target: str,
    inputs: Sequence[str],
    parts: Sequence[str],
    *,
    timeout: float,
    memory: int,
    threads: int,
    on_step: Callable[[str], None],
) -> dict[str, process.Outcome]:
    """The outcome of each part; after a crash or a hang of one, a fresh child goes on with the next."""
    found: dict[str, process.Outcome] = {}
    waiting = list(parts)
    while waiting:
        with tempfile.TemporaryDirectory(prefix="torchship-doctor-") as folder:
            told = Round(target, tuple(inputs), tuple(waiting), folder, timeout)
            done = process.run(
                "torchship.optimize.doctor.rounds:round_here",
                argument=msgspec.to_builtins(told),
                timeout=(timeout + 10) * len(waiting),  # the child's own alarm rings first
                memory=memory,
                threads=threads,
            )
            while waiting and (path := Path(folder, waiting[0])).is_file():
                answer = msgspec.json.decode(path.read_bytes(), type=_Answer)
                on_step(waiting[0])
                found[waiting.pop(0)] = process.Outcome(answer.value, log=done.log, seconds=answer.seconds)
        if waiting:
            on_step(waiting[0])
            fault = f"did not finish within {timeout:.0f} s" if done.fault == _ALARM else done.fault
            found[waiting.pop(0)] = msgspec.structs.replace(done, value=None, fault=fault)
    return found


def round_here(given: Any) -> None:
    """The child's side."""
    told = msgspec.convert(given, Round)
    patient: Patient | None = None
    broken: Exception | None = None
    for part in told.parts:
        signal.setitimer(signal.ITIMER_REAL, told.seconds)  # its default action ends native code that hangs too
        started = time.monotonic()
        case = msgspec.to_builtins(Case(told.target, told.inputs, part))
        if patient is None and broken is None:
            try:
                patient = admit(case)
            except Exception as fault:
                broken = fault
        if part == MODULE:
            value = look(case, patient=patient)
        else:
            value = routes.refused(part, broken) if broken else routes.walk(case, patient=patient)
        unfinished = Path(told.folder, "unfinished")
        unfinished.write_bytes(msgspec.json.encode(_Answer(value, time.monotonic() - started)))
        unfinished.rename(unfinished.with_name(part))
