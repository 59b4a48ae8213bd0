"""The examination of a module: every route and every look in a child of its own, gathered in one report."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from torchship import process
from torchship.errors import BadConfig, CaptureFailed, NotFound, TorchshipError
from torchship.hardware import here
from torchship.optimize.doctor import failure
from torchship.optimize.doctor.cost import Cost, estimate
from torchship.optimize.doctor.diagnose import Diagnosis, diagnose, diagnose_break, suspected
from torchship.optimize.doctor.findings import Finding, examine
from torchship.optimize.doctor.patient import Case, admit
from torchship.optimize.doctor.routes import OPENS, ROUTE_NAMES, Outcome
from torchship.tensors import TensorSpec

_OURS = {kind.__name__: kind for kind in (BadConfig, NotFound, CaptureFailed)}


class RouteRow(msgspec.Struct, frozen=True):
    """One route: `ok` when it exports and agrees with the module; else why, and what to do."""

    route: str
    ok: bool
    opens: str
    summary: str = ""
    error: float | None = None
    diagnosis: Diagnosis | None = None
    seconds: float = 0.0


class Examination(msgspec.Struct, frozen=True):
    """All that was found about one module."""

    target: str
    signature: str
    routes: list[RouteRow]
    breaks: list[Diagnosis]
    graphs: int
    findings: list[Finding]
    cost: Cost | None = None
    notes: list[str] = []

    @property
    def healthy(self) -> bool:
        """Whether torch.export or ONNX takes the module as it is, and nothing gives wrong results."""
        shipped = any(row.ok for row in self.routes if row.route in ("export", "onnx"))
        return shipped and not any(finding.level == "bad" for finding in self.findings)


class _Seen(msgspec.Struct, frozen=True):
    """What the child that looks at the module itself sends back; `kind` and `hint` of the error that stopped it."""

    signature: str = ""
    findings: list[Finding] = []
    cost: Cost | None = None
    notes: list[str] = []
    failed: failure.Failure | None = None
    kind: str = ""
    words: str = ""
    hint: str = ""


def look(given: Any) -> Any:
    """A child's work: findings and costs of one Case, as plain data."""
    try:
        patient = admit(given)
    except TorchshipError as fault:
        seen = _Seen(failed=failure.of(fault), kind=type(fault).__name__, words=str(fault), hint=fault.hint)
        return msgspec.to_builtins(seen)
    notes = []
    try:
        cost: Cost | None = estimate(patient, hardware=here())
    except Exception as fault:  # an estimate that cannot be made is no reason to say nothing
        cost = None
        notes.append(f"no cost estimate: {type(fault).__name__}: {' '.join(str(fault).split())[:160]}")
    return msgspec.to_builtins(_Seen(str(patient.model.signature), examine(patient), cost, notes))


def diagnose_target(
    target: str,
    *,
    inputs: Sequence[str],
    routes: Sequence[str] = ROUTE_NAMES,
    timeout: float = 180.0,
    memory: int | None = None,
    on_step: Callable[[str], None] = lambda name: None,
) -> Examination:
    """Examine the module that `target` (`module:attribute`) names, on inputs such as `x:FP32[-1,16]`.

    Every look runs in a child for at most `timeout` seconds and `memory` bytes (default: 80 % of the machine's), so
    that a crash costs one row. `on_step(name)` is called as they finish.

    Raises BadConfig, NotFound and CaptureFailed when there is nothing to examine.
    """
    for text in inputs:
        TensorSpec.parse(text)
    unknown = [name for name in routes if name not in ROUTE_NAMES]
    if unknown or not inputs:
        words = f"unknown route {unknown[0]!r}" if unknown else "no inputs are given"
        raise BadConfig(words, hint=f"routes: {', '.join(ROUTE_NAMES)}" if unknown else 'add --input "x:FP32[-1,16]"')
    limit = memory or int(here().memory * 0.8)
    threads = max(1, here().cores // 2)

    def child(entry: str, part: str) -> process.Outcome:
        case = msgspec.to_builtins(Case(target, tuple(inputs), part))
        done = process.run(
            f"torchship.optimize.doctor.{entry}", argument=case, timeout=timeout, memory=limit, threads=threads
        )
        on_step(part or "module")
        return done

    seen = _seen(child("examination:look", ""))
    _stop_if_nothing(seen)
    with ThreadPoolExecutor(min(2, max(1, (os.cpu_count() or 2) // 2 + 1))) as pool:
        done = list(pool.map(lambda name: child("routes:walk", name), routes))
    rows = [_row(name, outcome) for name, outcome in zip(routes, done, strict=True)]
    compiled = next((_outcome(outcome) for name, outcome in zip(routes, done, strict=True) if name == "compile"), None)
    return Examination(
        target,
        seen.signature,
        rows,
        [diagnose_break(found) for found in compiled.breaks] if compiled else [],
        compiled.graphs if compiled else 0,
        seen.findings,
        seen.cost,
        seen.notes,
    )


def _seen(done: process.Outcome) -> _Seen:
    if done.value is not None:
        return msgspec.convert(done.value, _Seen)
    last = done.log.splitlines()[-1] if done.log else ""
    return _Seen(notes=[f"the module's own examination {done.fault}{f': {last}' if last else ''}"])


def _stop_if_nothing(seen: _Seen) -> None:
    if seen.failed is None:
        return
    place = seen.failed.places[-1] if seen.failed.places else None
    words = f"{seen.words}{f' [{place}: {place.code}]' if place else ''}"
    hint = seen.hint
    if place is not None:
        found = diagnose(seen.failed)
        hint = f"{found.words}: {found.edit}" if found.construct not in ("unknown", "graph break") else hint
    raise _OURS.get(seen.kind, CaptureFailed)(words, hint=hint)


def _outcome(done: process.Outcome) -> Outcome | None:
    return None if done.value is None else msgspec.convert(done.value, Outcome)


def _row(name: str, done: process.Outcome) -> RouteRow:
    found, opens = _outcome(done), OPENS[name]
    if found is None:
        last = next((line for line in reversed(done.log.splitlines()) if line.strip()), "")
        words = f"the exporter {done.fault}" if not done.fault[:1].isupper() else f"the exporter failed: {done.fault}"
        return RouteRow(
            name, False, opens, f"{words}{f' ({last.strip()[:120]})' if last else ''}", seconds=done.seconds
        )
    if found.wrong:
        diagnosis = diagnose(found.failure, suspects=found.suspects) if found.failure else suspected(found.suspects)
        return RouteRow(name, False, opens, found.wrong, found.error, diagnosis, done.seconds)
    if found.failure is not None:
        diagnosis = diagnose(found.failure, suspects=found.suspects)
        return RouteRow(name, False, opens, diagnosis.words, None, diagnosis, done.seconds)
    summary = f"in {found.graphs} graph{'s' if found.graphs != 1 else ''}" if name == "compile" else ""
    return RouteRow(name, True, opens, summary, found.error, None, done.seconds)
