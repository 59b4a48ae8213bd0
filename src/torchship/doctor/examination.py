"""Examines a module: what every route and every look found, in one report.

Each is a child of its own, forked from a process that has imported torch; a crash or a hang costs one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import msgspec

from torchship import process
from torchship.doctor import failure, routes
from torchship.doctor.catalog import tables
from torchship.doctor.cost import Cost, estimate
from torchship.doctor.diagnose import Diagnosis, diagnose
from torchship.doctor.failure import Failure
from torchship.doctor.findings import Finding, examine
from torchship.doctor.routes import ROUTES, RouteAnswer, RouteRow
from torchship.doctor.subject import Subject, admit
from torchship.errors import BadConfig, CaptureFailed, NotFound
from torchship.hardware import here
from torchship.optimize.forkserver import Forkserver
from torchship.tensors import TensorSpec

_MODULE = "module"  # the look at the module itself; the other parts are routes
# two children at once, about equally long
_GROUPS = ((_MODULE, "export", "trace", "script", "onnx"), ("export strict", "compile"))
_SLOW_IMPORTS = ("torch.export", "torch._dynamo", "onnxscript", __name__)
_OURS = {kind.__name__: kind for kind in (BadConfig, NotFound, CaptureFailed)}


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


class Seen(msgspec.Struct, frozen=True):
    """What is found about the module itself; `failed` is the error that stopped it."""

    signature: str = ""
    findings: list[Finding] = []
    cost: Cost | None = None
    notes: list[str] = []
    failed: Failure | None = None


def diagnose_target(
    target: str,
    *,
    inputs: Sequence[str],
    routes: Sequence[str] = tuple(ROUTES),
    timeout: float = 180.0,
    memory: int | None = None,
    on_step: Callable[[str], None] = lambda name: None,
) -> Examination:
    """Examine the module that `target` (`module:attribute`) names, on inputs such as `x:FP32[-1,16]`.

    Each look takes at most `timeout` seconds, in a child with `memory` bytes (default: 80 % of the machine's); a crash
    costs one row. `on_step(name)` is called as they finish.

    Raises BadConfig, NotFound and CaptureFailed when there is nothing to examine.
    """
    for text in inputs:
        TensorSpec.parse(text)
    unknown = [name for name in routes if name not in ROUTES]
    if unknown or not inputs:
        words = f"unknown route {unknown[0]!r}" if unknown else "no inputs are given"
        raise BadConfig(words, hint=f"routes: {', '.join(ROUTES)}" if unknown else 'add --input "x:FP32[-1,16]"')
    limit = memory or int(here().memory * 0.8)

    def walked(group: Sequence[str]) -> dict[str, process.Outcome]:
        found = {}
        with closing(Forkserver(_SLOW_IMPORTS, threads=max(1, here().cores // 2))) as server:
            for part in (part for part in group if part == _MODULE or part in routes):
                task = (target, tuple(inputs), part)
                found[part] = server.run(f"{__name__}:part_here", argument=task, timeout=timeout, memory=limit)
                on_step(part)
        return found

    with ThreadPoolExecutor(len(_GROUPS)) as pool:
        done = {part: outcome for found in pool.map(walked, _GROUPS) for part, outcome in found.items()}
    seen = _seen(done.pop(_MODULE))
    answers = [_answer(name, done[name]) for name in routes]
    return Examination(
        target,
        seen.signature,
        [answer.row for answer in answers],
        [diagnosis for answer in answers for diagnosis in answer.breaks],
        sum(answer.graphs for answer in answers),
        seen.findings,
        seen.cost,
        seen.notes,
    )


def part_here(given: Any) -> Any:
    """A child's work: one part of the examination as plain data."""
    target, inputs, part = given
    try:
        subject = admit(target, inputs)
    except Exception as fault:
        if part == _MODULE:
            return msgspec.to_builtins(Seen(failed=failure.of(fault)))
        raise
    return msgspec.to_builtins(look(subject) if part == _MODULE else routes.walk(subject, part))


def look(subject: Subject) -> Seen:
    """Findings and costs of the module itself."""
    cost, notes = None, []
    try:
        cost = estimate(subject, hardware=here())
    except Exception as fault:  # an estimate that cannot be made is no reason to say nothing
        notes.append(f"no cost estimate: {type(fault).__name__}: {' '.join(str(fault).split())[:160]}")
    return Seen(str(subject.model.signature), examine(subject), cost, notes)


def _seen(done: process.Outcome) -> Seen:
    """What was found about the module itself. Raises the error that stopped it, with the user's line."""
    if done.value is None:
        last = done.log.splitlines()[-1] if done.log else ""
        return Seen(notes=[f"the module's own examination {done.fault}{f': {last}' if last else ''}"])
    seen = msgspec.convert(done.value, Seen)
    fault = seen.failed
    if fault is None:
        return seen
    kind, place, words, hint = _OURS.get(fault.kind, CaptureFailed), fault.place, fault.words, fault.hint
    if kind is CaptureFailed and place is not None:
        found = diagnose(fault)
        hint = f"{found.words}: {found.edit}" if found.construct not in ("unknown", "graph break") else hint
        words += "" if str(place) in words else f" [{place}: {place.code}]"
    raise kind(words, hint=hint)


def _answer(name: str, done: process.Outcome) -> RouteAnswer:
    if done.value is not None:
        answer = msgspec.convert(done.value, RouteAnswer)
        return msgspec.structs.replace(answer, row=msgspec.structs.replace(answer.row, seconds=done.seconds))
    last = next((line for line in reversed(done.log.splitlines()) if line.strip()), "")
    words = f"the exporter {done.fault}" if not done.fault[:1].isupper() else f"the exporter failed: {done.fault}"
    summary = f"{words}{f' ({last.strip()[:120]})' if last else ''}"
    return RouteAnswer(RouteRow(name, False, tables().routes[name], summary, seconds=done.seconds))
