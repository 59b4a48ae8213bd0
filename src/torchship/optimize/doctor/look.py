"""The look at the module itself, whatever the route: findings and costs."""

from __future__ import annotations

from typing import Any

import msgspec

from torchship.errors import TorchshipError
from torchship.hardware import here
from torchship.optimize.doctor import failure
from torchship.optimize.doctor.cost import Cost, estimate
from torchship.optimize.doctor.findings import Finding, examine
from torchship.optimize.doctor.patient import Patient, admit


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


def look(given: Any, *, patient: Patient | None = None) -> Any:
    """A child's work: findings and costs of one Case, as plain data."""
    try:
        patient = patient or admit(given)
    except TorchshipError as fault:
        seen = Seen(failed=failure.of(fault), kind=type(fault).__name__, words=str(fault), hint=fault.hint)
        return msgspec.to_builtins(seen)
    notes = []
    try:
        cost: Cost | None = estimate(patient, hardware=here())
    except Exception as fault:  # an estimate that cannot be made is no reason to say nothing
        cost = None
        notes.append(f"no cost estimate: {type(fault).__name__}: {' '.join(str(fault).split())[:160]}")
    return msgspec.to_builtins(Seen(str(patient.model.signature), examine(patient), cost, notes))
