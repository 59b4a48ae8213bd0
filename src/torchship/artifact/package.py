"""Packs a folder of backend files into an artifact: hashes every file, then writes the manifest last."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from torchship import hardware, plugins
from torchship.artifact import folder as folders
from torchship.artifact import tensorfile
from torchship.artifact.folder import MANIFEST, SIGNATURE
from torchship.artifact.manifest import FORMAT, FileEntry, Manifest, Provenance
from torchship.artifact.opening import Artifact, open_artifact
from torchship.errors import BadConfig, BadInput
from torchship.recipe import Recipe
from torchship.tensors import Signature, Tensors


def pack(
    folder: Path | str,
    *,
    name: str,
    signature: Signature,
    recipe: Recipe,
    provenance: Provenance,
    max_batch: int = 64,
    inputs: Tensors = {},
    outputs: Tensors = {},
    labels: Sequence[str] = (),
    kind: Literal["model", "pipeline"] = "model",
) -> Artifact:
    """Turn `folder`, whose `backend/` (and `fallback/`) a backend has filled, into an artifact in place.

    `inputs` are example inputs that fit the signature and `outputs` what the artifact must answer to them; what is
    found out later, as timing, verdict and fallback, `amend` adds.
    Until the manifest is there, which is written last, the folder is no artifact; a crash leaves none.
    Raises BadInput when the examples do not fit, UnsafeArtifact for links and devices among the files.
    """
    root = Path(folder)
    folders.files_below(root)
    (root / MANIFEST).unlink(missing_ok=True)
    (root / SIGNATURE).unlink(missing_ok=True)
    if inputs:
        try:
            signature.check(inputs)
        except BadInput as fault:
            raise BadInput(f"example inputs: {fault}", hint=fault.hint) from None
        folders.write(root / "examples" / "inputs.safetensors", tensorfile.encode(inputs))
    if outputs:
        folders.write(root / "examples" / "outputs.safetensors", tensorfile.encode(outputs))
    machine = hardware.here()
    manifest = Manifest(
        format=FORMAT,
        name=name,
        signature=signature,
        recipe=recipe,
        files=(),
        provenance=provenance,
        hardware=machine.line,
        fingerprint=machine.fingerprint,
        family=machine.family,
        max_batch=max_batch,
        kind=kind,
        labels=tuple(labels),
    )
    return _seal(root, manifest)


def amend(folder: Path | str, **changes: Any) -> Artifact:
    """Change fields of the manifest (`timing`, `verdict`, `labels`, `name` ...) and take in files that were added,
    such as those under `report/`. What was packed before may not have changed. A signature is dropped.

    Raises CorruptArtifact when a file of the artifact was changed or lost, BadConfig for an unknown field.
    """
    artifact = open_artifact(folder, verify="known")
    unknown = set(changes) - set(Manifest.__struct_fields__) | set(changes) & {"files", "format"}
    if unknown:
        raise BadConfig(f"the manifest has no field {sorted(unknown)} to amend")
    (artifact.path / SIGNATURE).unlink(missing_ok=True)
    return _seal(artifact.path, msgspec.structs.replace(artifact.manifest, **changes))


def add_fallback(folder: Path | str, *, other: Path | str) -> Artifact:
    """Give an artifact of native code a portable fallback: the data files of `other`, an artifact of the same model.

    Raises BadConfig when `other` has another signature or holds native code itself.
    """
    ours, theirs = open_artifact(folder), open_artifact(other)
    if theirs.manifest.signature != ours.manifest.signature:
        raise BadConfig(f"{other} has another signature", hint="a fallback takes and gives the same tensors")
    if any(entry.kind == "native" for entry in theirs.manifest.files):
        raise BadConfig(f"{other} holds native code", hint="a fallback must open on any machine")
    shutil.rmtree(ours.path / "fallback", ignore_errors=True)
    shutil.copytree(theirs.path / "backend", ours.path / "fallback")
    return amend(ours.path, fallback=theirs.manifest.recipe)


def _seal(root: Path, manifest: Manifest) -> Artifact:
    """Hash every file and write the manifest, after everything else is on the disk."""
    native = _native_places(root, manifest)
    entries = []
    for path, info in folders.files_below(root).items():
        if path in (MANIFEST, SIGNATURE):
            continue
        code: Literal["native", "data"] = "native" if path.startswith(native) else "data"
        entries.append(FileEntry(path, folders.sha256(root, path), info.st_size, code))
        folders.sync(root / path)
    for place, _, _ in os.walk(root):
        folders.sync(Path(place))
    sealed = msgspec.structs.replace(manifest, files=tuple(entries))
    data = msgspec.json.format(msgspec.json.encode(sealed), indent=1)
    folders.write(root / MANIFEST, data)
    return Artifact(root, sealed, hashlib.sha256(data).hexdigest())


def _native_places(root: Path, manifest: Manifest) -> tuple[str, ...]:
    """How the paths of native files begin: those of native backends, also in the models of a pipeline."""
    if manifest.kind == "pipeline":
        inner = [open_artifact(place.parent, verify=False) for place in sorted(root.glob(f"models/*/{MANIFEST}"))]
        files = ((f"models/{found.path.name}/{entry.path}", entry) for found in inner for entry in found.manifest.files)
        return tuple(path for path, entry in files if entry.kind == "native")
    parts = [("backend/", manifest.recipe)] + ([("fallback/", manifest.fallback)] if manifest.fallback else [])
    return tuple(place for place, recipe in parts if plugins.load("backends", name=recipe.backend).KIND == "native")
