"""Checks an artifact on a machine it was not made on: the stored examples must give the stored outputs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torchship import hardware, home
from torchship.artifact.manifest import Manifest
from torchship.difference import relative_error, share_equal
from torchship.errors import BadConfig, WrongMachine
from torchship.stage import Stage
from torchship.tensors import FLOATS, Signature, Tensors, dtype_name

TOLERANCE = 0.05
_SAME_SHARE = 0.95


def once(
    stage: Stage, manifest: Manifest, digest: str, *, inputs: Callable[[], Tensors], outputs: Callable[[], Tensors]
) -> Stage:
    """`stage`, which passed `check` where this machine, or a package that runs it, is another than when it was made.

    That it passed is noted, where a note can be written, and not asked again; a stage that does not is closed.
    """
    family = hardware.here().family
    versions = {name: hardware.version(name) for name in manifest.provenance.packages}
    if manifest.family == family and manifest.provenance.packages == versions:
        return stage
    facts = repr((digest, family, sorted(versions.items()))).encode()
    note = None
    with suppress(BadConfig):  # a user without a usable home
        folder = home.folder("XDG_CACHE_HOME", ".cache") / "torchship" / "verified"
        note = folder / hashlib.sha256(facts).hexdigest()[:32]
    if note and os.path.exists(note):
        return stage
    try:
        check(stage, manifest, inputs=inputs(), outputs=outputs())
    except BaseException:
        stage.close()
        raise
    if note:
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
    return stage


def check(stage: Stage, manifest: Manifest, *, inputs: Tensors, outputs: Tensors) -> None:
    """Run the examples. Raises WrongMachine when the relative L2 error of an output is above 5 % (or thrice what the
    guard measured), or less than 95 % of an integer output is the same.
    """
    if not inputs or not outputs:
        return
    rows: Any = ...
    if manifest.signature.batched:
        rows = slice(min(stage.max_batch, *(len(array) for array in inputs.values())))
    found = stage({name: array[rows] for name, array in inputs.items()})
    wanted = {name: array[rows] for name, array in outputs.items()}
    same(manifest, wanted, found)


def same(manifest: Manifest, wanted: Tensors, found: Tensors) -> None:
    """Raise WrongMachine when an artifact's answers `found` differ from its stored ones more than `check` allows."""
    allowed = max(TOLERANCE, 3 * manifest.verdict.error if manifest.verdict else 0.0)
    for name, fault in faults(manifest.signature, wanted, found, allowed=allowed).items():
        raise WrongMachine(
            f"{manifest.name!r} answers its stored examples differently here: {name} {fault}",
            hint="optimize the model again on this machine",
        )


def faults(signature: Signature, wanted: Tensors, found: Tensors, *, allowed: float) -> dict[str, str]:
    """What is wrong with `found`, by output."""
    wrong: dict[str, str] = {}
    for spec in signature.outputs:
        if spec.name not in wanted:
            continue
        ours, theirs = found.get(spec.name), wanted[spec.name]
        if ours is None or ours.shape != theirs.shape or dtype_name(ours.dtype) != dtype_name(theirs.dtype):
            wrong[spec.name] = "has another shape or datatype"
        elif spec.dtype in FLOATS:
            error = relative_error(theirs, ours)
            if not error <= allowed:
                wrong[spec.name] = f"is off by {error:.3g} (relative L2 error, {allowed:.3g} allowed)"
        elif (share := share_equal(theirs, ours)) < _SAME_SHARE:
            wrong[spec.name] = f"agrees in {share:.0%} of its values"
    return wrong
