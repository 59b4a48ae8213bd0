"""Turns what a route said into a diagnosis: the user's line, the construct, plain words and a proposed edit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from torchship.errors import BuildFailed
from torchship.optimize.doctor import edits, failure
from torchship.optimize.doctor.constructs import CONSTRUCTS, Construct, recognise
from torchship.optimize.doctor.failure import Failure
from torchship.optimize.doctor.routes import Break
from torchship.optimize.places import Place, is_installed


class Diagnosis(msgspec.Struct, frozen=True):
    """Why a route refuses a module. `old` and `new` are source to replace, empty where no safe rewrite is known."""

    construct: str
    words: str
    edit: str
    place: Place | None = None
    said: str = ""
    old: str = ""
    new: str = ""


Suspects: TypeAlias = Sequence[tuple[str, Place]]
_FREEZES = (".item()", "data-dependent if", "numpy inside the model", "size written into the code", "random numbers")


def diagnose(fault: Failure, *, suspects: Suspects = ()) -> Diagnosis:
    """The diagnosis of a failed route; `suspects` help out where the error names no line, or nothing that is known."""
    found = _diagnosis(fault.text, fault.places, said=first_words(fault.text))
    if found.place is None and found.construct != "unknown":
        place = next((place for name, place in suspects if name == found.construct), None)
        return _diagnosis(fault.text, (place,), said=found.said) if place else found
    if found.construct == "unknown" and suspects:
        return suspected(suspects, said=found.said) or found
    return found


def in_plain_words(fault: BuildFailed) -> BuildFailed:
    """The same refusal with the user's line and the construct, where its causes name them; else as it was."""
    found = diagnose(failure.of(fault))
    if found.construct == "unknown" or found.place is None:
        return fault
    where = f"{found.place}: {found.place.code}" if found.place.code else f"{found.place}"
    return BuildFailed(f"{found.construct} ({where}): {found.words}", hint=found.edit)


def suspected(suspects: Suspects, *, said: str = "") -> Diagnosis | None:
    """The diagnosis of a route that gives wrong results: the first line of the source that a trace freezes."""
    for name, place in suspects:
        construct = next((construct for construct in CONSTRUCTS if construct.name == name), None)
        if name in _FREEZES and construct is not None:
            old, new = edits.propose(place.file, place.line, construct=name)
            return Diagnosis(name, construct.words, construct.edit, place, said, old, new)
    return None


def diagnose_break(found: Break) -> Diagnosis:
    """The diagnosis of a graph break."""
    return _diagnosis(f"graph break: {found.reason}", found.places, said=first_words(found.reason))


def _diagnosis(text: str, places: tuple[Place, ...], *, said: str) -> Diagnosis:
    place, construct = _located(text, places)
    edit = construct.edit
    if place is not None and is_installed(place.file):
        edit += " (this line is in an installed package: subclass it, or wrap the call)"
    if construct.name == "size written into the code":
        edit += _allowed(text)
    if construct.name == "operator that ONNX does not have":
        said = _operator(text) or said
    old, new = edits.propose(place.file, place.line, construct=construct.name) if place else ("", "")
    return Diagnosis(construct.name, construct.words, edit, place, said, old, new)


def _located(text: str, places: tuple[Place, ...]) -> tuple[Place | None, Construct]:
    """The innermost of the user's lines whose code fits the construct, else the innermost at all."""
    if not places:
        return None, recognise(text, "")
    for place in reversed(places):
        construct = recognise(text, place.code)
        if construct.code:
            return place, construct
    return places[-1], recognise(text, places[-1].code)


def _allowed(text: str) -> str:
    """What the exporter found out about the lengths that the code allows: `b = 2*_b`."""
    found = re.search(r"Suggested fixes:\s*\n((?:\s+.+\n?)+)", text)
    guard = re.search(r"satisfy the generated guard (.+?)\.?(?:\n|$)", text)
    words = "; ".join(line.strip() for line in found[1].strip().splitlines()[:3]) if found else ""
    return (f" (the code asks for {guard[1]})" if guard else "") + (
        f" (the exporter suggests {words})" if words else ""
    )


def _operator(text: str) -> str:
    found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", text)
    return f"no ONNX operator for {found[1]}" if found else ""


def first_words(text: str) -> str:
    """The first line of an error that says something, at most 200 characters."""
    skipped = ("Failed to export the model", "TorchExportError", "ConversionError: Failed", "- ", "## ", "Next steps")
    lines = [line.strip() for line in text.splitlines()]
    found = next((line for line in lines if line and not line.startswith(skipped)), lines[0] if lines else "")
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", found)[:200]
