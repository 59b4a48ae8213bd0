"""The examination of a module: what every route and every look found, gathered in one report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from torchship import process
from torchship.doctor import runner
from torchship.doctor.cost import Cost
from torchship.doctor.diagnose import Diagnosis, diagnose, diagnose_break, suspected
from torchship.doctor.findings import Finding
from torchship.doctor.routes import OPENS, ROUTE_NAMES, RouteOutcome
from torchship.doctor.runner import Seen
from torchship.errors import BadConfig, CaptureFailed, NotFound
from torchship.hardware import here
from torchship.tensors import TensorSpec

# two children at once, about equally long: each brings the subject up once
_GROUPS = ((runner.MODULE, "export", "trace", "script", "onnx"), ("export strict", "compile"))
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

    Each look takes at most `timeout` seconds, in a child with `memory` bytes (default: 80 % of the machine's); a crash
    costs one row. `on_step(name)` is called as they finish.

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

    def walked(group: Sequence[str]) -> dict[str, process.Outcome]:
        order = [name for name in group if name == runner.MODULE or name in routes]
        return runner.walk(target, inputs, order, timeout=timeout, memory=limit, threads=threads, on_step=on_step)

    with ThreadPoolExecutor(len(_GROUPS)) as pool:
        done = {name: outcome for found in pool.map(walked, _GROUPS) for name, outcome in found.items()}
    seen = _seen(done.pop(runner.MODULE))
    _stop_if_nothing(seen)
    rows = [_row(name, done[name]) for name in routes]
    compiled = _outcome(done["compile"]) if "compile" in done else None
    return Examination(
        target,
        seen.signature,
        rows,
        [diagnose_break(found, suspects=compiled.suspects) for found in compiled.breaks] if compiled else [],
        compiled.graphs if compiled else 0,
        seen.findings,
        seen.cost,
        seen.notes,
    )


def _seen(done: process.Outcome) -> Seen:
    if done.value is not None:
        return msgspec.convert(done.value, Seen)
    last = done.log.splitlines()[-1] if done.log else ""
    return Seen(notes=[f"the module's own examination {done.fault}{f': {last}' if last else ''}"])


def _stop_if_nothing(seen: Seen) -> None:
    if seen.failed is None:
        return
    kind = _OURS.get(seen.kind, CaptureFailed)
    if kind is not CaptureFailed:
        raise kind(seen.words, hint=seen.hint)
    place = seen.failed.place
    told = f" [{place}: {place.code}]" if place and str(place) not in seen.words else ""
    hint = seen.hint
    if place is not None:
        found = diagnose(seen.failed)
        hint = f"{found.words}: {found.edit}" if found.construct not in ("unknown", "graph break") else hint
    raise kind(f"{seen.words}{told}", hint=hint)


def _outcome(done: process.Outcome) -> RouteOutcome | None:
    return None if done.value is None else msgspec.convert(done.value, RouteOutcome)


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
    summary = ""
    if name == "compile":  # told to keep it whole, the compiler follows more
        summary = f"with fullgraph=True; in {found.graphs} graphs without" if found.graphs > 1 else "in 1 graph"
    return RouteRow(name, True, opens, summary, found.error, None, done.seconds)
