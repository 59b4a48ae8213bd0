"""Turns what a route said into a diagnosis: the user's line, the construct, plain words and a proposed edit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from torchship.doctor import edits, failure
from torchship.doctor.catalog import UNKNOWN, Row, constructs, recognise
from torchship.doctor.failure import Failure
from torchship.errors import BuildFailed
from torchship.optimize.places import Place, is_installed


class Diagnosis(msgspec.Struct, frozen=True):
    """Why a route refuses a module. `old` and `new` are source to replace, empty where no safe rewrite is known.

    `called` is the user's own line that leads to `place` where that lies in an installed package.
    """

    construct: str
    words: str
    edit: str
    place: Place | None = None
    said: str = ""
    old: str = ""
    new: str = ""
    called: Place | None = None


Suspects: TypeAlias = Sequence[tuple[str, Place]]


def diagnose(fault: Failure, *, suspects: Suspects = ()) -> Diagnosis:
    """The diagnosis of a failed route.

    `suspects` (constructs that the user's source holds) help out where the error names no line, or one that shows
    nothing.
    """
    place, row = _located(fault)
    said = first_words(fault.text)
    if not row.code:
        for name, seen in suspects:
            if constructs()[name].search(fault.text, re.I) and (place is None or str(place) == str(seen)):
                place, row = seen, constructs()[name]
                break
    if row.name == UNKNOWN and (found := suspected(suspects, said=said)):
        return found
    edit = row.edit
    if place is not None and is_installed(place.file):
        edit += " (this line is in an installed package: subclass it, or wrap the call)"
    if row.tells_lengths:
        edit += _allowed(fault.text)
    old, new = edits.propose(place.file, place.line, rewrite=row.rewrite) if place else ("", "")
    own = fault.place
    called = own if place and own and is_installed(place.file) and not is_installed(own.file) else None
    return Diagnosis(row.name, row.why, edit, place, said, old, new, called)


def suspected(suspects: Suspects, *, said: str = "") -> Diagnosis | None:
    """The diagnosis of a route that gives wrong results: the first line of the source that a trace freezes."""
    for name, place in suspects:
        row = constructs()[name]
        if row.freezes:
            old, new = edits.propose(place.file, place.line, rewrite=row.rewrite)
            return Diagnosis(name, row.why, row.edit, place, said, old, new)
    return None


def in_plain_words(fault: BuildFailed) -> BuildFailed:
    """The same refusal with the user's line and the construct, where its causes name them; else as it was."""
    found = diagnose(failure.of(fault))
    if found.construct == UNKNOWN or found.place is None:
        return fault
    where = f"{found.place}: {found.place.code}" if found.place.code else f"{found.place}"
    return BuildFailed(f"{found.construct} ({where}): {found.words}", hint=found.edit)


def _located(fault: Failure) -> tuple[Place | None, Row]:
    """The innermost of the lines whose code fits the construct, else the innermost of the user's own."""
    for place in reversed(fault.places):
        row = recognise(fault.text, place.code)
        if row.code:
            return place, row
    own = fault.place
    return own, recognise(fault.text, own.code if own else "")


def _allowed(text: str) -> str:
    """What the exporter found out about the lengths that the code allows: `b = 2*_b`."""
    found = re.search(r"Suggested fixes:\s*\n((?:\s+\w+ = .+\n?)+)", text)
    guard = re.search(r"satisfy the generated guard (.+?)\.?(?:\n|$)", text)
    words = "; ".join(line.strip() for line in found[1].strip().splitlines()[:3]) if found else ""
    return (f" (the code asks for {guard[1]})" if guard else "") + (
        f" (the exporter suggests {words})" if words else ""
    )


def first_words(text: str) -> str:
    """The first line of an error that says something, at most 200 characters."""
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", text)
    if operator:
        return f"no ONNX operator for {operator[1]}"
    skipped = ("Failed to export the model", "TorchExportError", "ConversionError: Failed", "- ", "## ", "Next steps")
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith(skipped) and not re.fullmatch(r"\w+:", line)]
    found = next(iter(kept), lines[0] if lines else "")
    found = re.sub(r"\s*\((unhinted|Size-like symbols): .*", "", found)
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", found)[:200]
