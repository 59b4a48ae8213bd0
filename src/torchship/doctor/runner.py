"""Runs an examination in children that bring the module up once; a part that falls costs its own row only."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from torchship import process
from torchship.doctor import failure, routes
from torchship.doctor.cost import Cost, estimate
from torchship.doctor.findings import Finding, examine
from torchship.doctor.subject import Case, Subject, admit
from torchship.errors import TorchshipError
from torchship.hardware import here

MODULE = "module"  # the look at the module itself; the other parts are routes
_ALARM = "killed by SIGALRM"


class Seen(msgspec.Struct, frozen=True):
    """What the child that looks at the module itself sends back; `kind` and `hint` of the error that stopped it."""

    signature: str = ""
    findings: list[Finding] = []
    cost: Cost | None = None
    notes: list[str] = []
    failed: failure.Failure | None = None
    kind: str = ""
    words: str = ""
    hint: str = ""


def look(given: Any, *, subject: Subject | None = None) -> Any:
    """A child's work: findings and costs of one Case, as plain data."""
    try:
        subject = subject or admit(given)
    except TorchshipError as fault:
        seen = Seen(failed=failure.of(fault), kind=type(fault).__name__, words=str(fault), hint=fault.hint)
        return msgspec.to_builtins(seen)
    notes = []
    try:
        cost: Cost | None = estimate(subject, hardware=here())
    except Exception as fault:  # an estimate that cannot be made is no reason to say nothing
        cost = None
        notes.append(f"no cost estimate: {type(fault).__name__}: {' '.join(str(fault).split())[:160]}")
    return msgspec.to_builtins(Seen(str(subject.model.signature), examine(subject), cost, notes))


class PartsTask(msgspec.Struct, frozen=True):
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
            told = PartsTask(target, tuple(inputs), tuple(waiting), folder, timeout)
            done = process.run(
                "torchship.doctor.runner:parts_here",
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


def parts_here(given: Any) -> None:
    """The child's side."""
    told = msgspec.convert(given, PartsTask)
    subject: Subject | None = None
    broken: Exception | None = None
    for part in told.parts:
        signal.setitimer(signal.ITIMER_REAL, told.seconds)  # its default action ends native code that hangs too
        started = time.monotonic()
        case = msgspec.to_builtins(Case(told.target, told.inputs, part))
        if subject is None and broken is None:
            try:
                subject = admit(case)
            except Exception as fault:
                broken = fault
        if part == MODULE:
            value = look(case, subject=subject)
        else:
            value = routes.refused(part, broken) if broken else routes.walk(case, subject=subject)
        unfinished = Path(told.folder, "unfinished")
        unfinished.write_bytes(msgspec.json.encode(_Answer(value, time.monotonic() - started)))
        unfinished.rename(unfinished.with_name(part))
