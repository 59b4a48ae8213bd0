"""Opens an artifact: nothing in it is believed before the manifest is understood and every file is hashed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import msgspec

from torchship import hardware, plugins
from torchship.artifact import folder as folders
from torchship.artifact import recheck, signing, tensorfile
from torchship.artifact.folder import MANIFEST, MAX_BYTES, MAX_FILES, SIGNATURE
from torchship.artifact.manifest import FORMAT, FileEntry, Manifest
from torchship.errors import CorruptArtifact, TorchshipError, Unavailable, UnsafeArtifact, Unsupported, WrongMachine
from torchship.recipe import Recipe
from torchship.stage import Stage
from torchship.tensors import Array

_MAX_MANIFEST = 16 * 2**20


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk, what its manifest says, and the SHA-256 of that manifest. Immutable: a change is a new
    version."""

    path: Path
    manifest: Manifest
    digest: str = ""

    def open(self, *, device: str = "cpu", threads: int = 0, trust: bool = False) -> Stage:
        """Open it as a Stage on `device` with `threads` threads (0: as many as there are cores).

        On a machine of another kind the portable fallback is opened where there is one; what is opened there for the
        first time must give the stored outputs for the stored examples. Raises UnsafeArtifact when it holds native
        code and neither `trust` nor a trusted signature allows it, WrongMachine, Unavailable when its backend cannot
        run here, Unsupported for a pipeline (the pipeline room opens those).
        """
        manifest = self.manifest
        if manifest.kind != "model":
            raise Unsupported(f"{manifest.name!r} is a {manifest.kind}", hint="open it with torchship.open")
        fault: TorchshipError | None = None
        parts = [("backend", manifest.recipe)] + ([("fallback", manifest.fallback)] if manifest.fallback else [])
        for part, recipe in parts:
            try:
                if fault is not None:
                    logging.getLogger(__name__).warning("%s; opening its portable fallback", fault.line)
                self._check_native(part, recipe, trust)
                stage = self._open_part(part, recipe, device, threads)
                return recheck.once(stage, manifest, self.digest, inputs=self.inputs, outputs=self.outputs)
            except (UnsafeArtifact, WrongMachine, Unavailable) as found:
                fault = fault or found
        assert fault is not None  # noqa: S101  # there is at least one part
        raise fault

    def _open_part(self, part: str, recipe: Recipe, device: str, threads: int) -> Stage:
        backend = plugins.load("backends", name=recipe.backend)
        try:
            opened = backend.open(
                self.path / part,
                signature=self.manifest.signature,
                options=recipe.options,
                device=device,
                threads=threads,
            )
        except ImportError as fault:
            packages = " ".join(getattr(backend, "PACKAGES", ())) or recipe.backend
            raise Unavailable(
                f"{self.manifest.name!r} needs the backend {recipe.backend!r}: {fault}",
                hint=f"pip install {packages}",
            ) from None
        return cast(Stage, opened)

    def _check_native(self, part: str, recipe: Recipe, trust: bool) -> None:
        """What the files are is said by the backend that will run them, not only by a manifest that may lie."""
        native = [e.path for e in self.manifest.files if e.kind == "native" and e.path.startswith(f"{part}/")]
        if not native and plugins.load("backends", name=recipe.backend).KIND != "native":
            return
        if not trust and not signing.is_trusted(self.path, digest=self.digest):
            raise UnsafeArtifact(
                f"{self.manifest.name!r} holds native code ({recipe.backend})",
                hint="open it with trust=True (--trust) if you know who made it, or trust its signer's key",
            )
        if self.manifest.family and self.manifest.family != hardware.here().family:
            raise WrongMachine(
                f"{self.manifest.name!r} holds native code for {self.manifest.hardware}; this is "
                f"{hardware.here().line}",
                hint="optimize the model again on this machine, or pack it with a portable fallback",
            )

    def inputs(self) -> dict[str, Array]:
        """The stored example inputs; empty when there are none."""
        return tensorfile.load(self.path / "examples" / "inputs.safetensors")

    def outputs(self) -> dict[str, Array]:
        """What the artifact answered to the example inputs when it was packed; empty when not stored."""
        return tensorfile.load(self.path / "examples" / "outputs.safetensors")

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(entry.size for entry in self.manifest.files)


class _Head(msgspec.Struct):
    """Just enough of any format version to refuse it politely."""

    format: int


def read_manifest(data: bytes, *, where: str) -> Manifest:
    """Decode and check a manifest. Raises CorruptArtifact, Unsupported for another format version, UnsafeArtifact."""
    try:
        version = msgspec.json.decode(data, type=_Head).format
    except msgspec.MsgspecError as fault:
        raise CorruptArtifact(f"{where} is not a manifest: {fault}", hint="pack the artifact again") from None
    if version != FORMAT:
        hint = "upgrade torchship" if version > FORMAT else "pack the artifact again with this torchship"
        raise Unsupported(f"{where} has format version {version}, this torchship reads {FORMAT}", hint=hint)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as fault:
        raise CorruptArtifact(f"{where}: {fault}", hint="pack the artifact again") from None
    paths = [folders.check_path(entry.path) for entry in manifest.files]
    if len(set(paths)) != len(paths) or {MANIFEST, SIGNATURE} & set(paths):
        raise CorruptArtifact("the manifest lists a file twice, or lists itself", hint="pack the artifact again")
    if len(paths) > MAX_FILES:
        raise UnsafeArtifact(f"the manifest lists {len(paths)} files", hint=f"at most {MAX_FILES} are allowed")
    sizes = [entry.size for entry in manifest.files]
    if min(sizes, default=0) < 0 or sum(sizes) > MAX_BYTES:
        raise UnsafeArtifact("the manifest lists files of an impossible size", hint="do not open this artifact")
    return manifest


def open_artifact(path: Path | str, *, verify: bool | Literal["known"] = True) -> Artifact:
    """The artifact in the folder `path`, verified: every file hashed, unknown files and links refused.

    `verify=False` only reads the manifest; `verify="known"` lets files pass that the manifest does not list.
    Raises NotFound, CorruptArtifact, UnsafeArtifact, or Unsupported for an unknown format version.
    """
    root = Path(path)
    present = folders.files_below(root)
    if MANIFEST not in present:
        raise CorruptArtifact(f"{root} has no {MANIFEST}", hint="packing did not finish, or this is no artifact")
    data = folders.read(root, MANIFEST, limit=_MAX_MANIFEST)
    manifest = read_manifest(data, where=str(root / MANIFEST))
    if verify:
        check_files(root, manifest.files, unlisted=verify == "known")
    return Artifact(root, manifest, hashlib.sha256(data).hexdigest())


def check_files(root: Path, files: Sequence[FileEntry], *, unlisted: bool = False) -> None:
    """Raise CorruptArtifact unless the files below `root` are as its manifest lists them, others if `unlisted`."""
    present, listed = folders.files_below(root), {entry.path: entry for entry in files}
    missing = sorted(listed.keys() - present.keys())
    unknown = sorted(present.keys() - listed.keys() - {MANIFEST, SIGNATURE})
    if missing:
        raise CorruptArtifact(f"{root} lacks {missing[0]}", hint="copy or publish the artifact again")
    if unknown and not unlisted:
        raise CorruptArtifact(f"{root} holds {unknown[0]}, which its manifest does not list", hint="remove that file")
    for name, entry in listed.items():  # all sizes before the first hash, which takes long
        if present[name].st_size != entry.size:
            raise CorruptArtifact(
                f"{name} has {present[name].st_size} bytes, the manifest says {entry.size}",
                hint="copy or publish the artifact again",
            )
    for name, entry in listed.items():
        if folders.sha256(root, name) != entry.sha256:
            raise CorruptArtifact(f"{name} was changed: its hash is wrong", hint="copy or publish the artifact again")
