"""One archive that brings an artifact to a small machine: the artifact, its wheels, a configuration and a systemd unit.

Its `manifest.json` lists the SHA-256 of every file; `manifest.sig` signs that, as it does for an artifact.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import msgspec

from torchship import hardware, plugins
from torchship.artifact import archive, signing, wheels
from torchship.artifact import folder as folders
from torchship.artifact.folder import MANIFEST
from torchship.artifact.manifest import FileEntry, Manifest
from torchship.artifact.opening import Artifact, check_files, open_artifact
from torchship.artifact.store import check_name
from torchship.errors import CorruptArtifact, WrongMachine

TARGETS = {"pi4": "aarch64", "pi5": "aarch64", "x86-64": "x86_64"}
_MAX_MANIFEST = 16 * 2**20
_HOME = "/opt/torchship"
_DATA = "/var/lib/torchship"


class EdgePack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The manifest of a pack: for which target and Python, the artifact's name, whether wheels are inside."""

    target: Literal["pi4", "pi5", "x86-64"]
    python: str
    artifact: str
    wheels: bool
    torchship: str
    files: tuple[FileEntry, ...]
    edge_format: Literal[1] = 1

    @property
    def machine(self) -> str:
        """The processor as `uname -m` tells it."""
        return TARGETS[self.target]

    @property
    def install(self) -> list[str]:
        """Arguments of `pip install` in the pack's folder, with nothing but the wheels inside where there are any."""
        offline = ["--no-index", "--find-links", "wheels", "--require-hashes"]
        return (
            [*offline, "-r", "requirements.txt"]
            if self.wheels
            else ["-r", "requirements.txt", "--find-links", "wheels"]
        )


def pack(
    artifact: Artifact,
    *,
    target: Literal["pi4", "pi5", "x86-64"],
    python: str,
    to: Path | str,
    with_wheels: bool = True,
    key: Path | None = None,
) -> EdgePack:
    """Write the archive `to` (.tar or .zip), signed with the private key in the file `key` where one is given.

    Equal artifacts and wheels give an equal archive. Raises WrongMachine for native code made for another processor,
    BadConfig for a backend that needs torch, BuildFailed where there are no wheels for the target.
    """
    check_name(artifact.manifest.name)  # it is written into the unit and the configuration
    machine = TARGETS[target]
    models = _models(artifact, machine)
    wanted = wheels.requirements(models)
    with tempfile.TemporaryDirectory(prefix="torchship-edge-") as place:
        root = Path(place)
        shutil.copytree(artifact.path, root / "artifact")
        (root / "wheels").mkdir()
        ours = wheels.ours(root / "wheels")
        if with_wheels:
            wheels.download(wanted, machine=machine, python=python, to=root / "wheels")
            lines = wheels.locked(root / "wheels")
        else:
            lines = "".join(f"{need}\n" for need in [*wanted, f"torchship=={ours.name.split('-')[1]}"])
        found = EdgePack(target, python, artifact.manifest.name, with_wheels, hardware.version("torchship"), ())
        _describe(root, artifact.manifest, found, requirements=lines)
        found = msgspec.structs.replace(found, files=entries(root, artifact))
        data = msgspec.json.format(msgspec.json.encode(found), indent=1)
        (root / MANIFEST).write_bytes(data)
        if key:
            signing.sign(root, digest=hashlib.sha256(data).hexdigest(), key=key)
        archive.write(root, [entry.path for entry in found.files], to=to)
    return found


def unpack(file: Path | str, *, to: Path) -> tuple[EdgePack, str]:
    """Write a pack below the new folder `to` and check every file of it. Returns its manifest, and that one's SHA-256.

    Raises NotFound, BadConfig, CorruptArtifact, UnsafeArtifact. Whose it is, `signing.check` tells.
    """
    archive.unpack(file, to=to)
    data = folders.read(to, MANIFEST, limit=_MAX_MANIFEST)
    try:
        found = msgspec.json.decode(data, type=EdgePack)
    except msgspec.MsgspecError as fault:
        raise CorruptArtifact(f"{file} is no edge pack: {fault}", hint="make one with `torchship edge pack`") from None
    for entry in found.files:
        folders.check_path(entry.path)
    check_files(to, found.files)
    return found, hashlib.sha256(data).hexdigest()


def _models(artifact: Artifact, machine: str) -> list[Manifest]:
    """The manifests of the models inside, each of which can run on `machine`."""
    models = [artifact.manifest]
    if artifact.manifest.kind == "pipeline":
        places = sorted(artifact.path.glob(f"models/*/{MANIFEST}"))
        models = [open_artifact(place.parent, verify=False).manifest for place in places]
    for manifest in models:
        native = plugins.load("backends", name=manifest.recipe.backend).KIND == "native"
        if native and not manifest.fallback and machine != hardware.here().machine:
            raise WrongMachine(
                f"{manifest.name!r} holds native code ({manifest.recipe.backend}) for {manifest.hardware}",
                hint=f"optimize it on the {machine} machine, or with a portable backend such as onnxruntime",
            )
    return models


def _describe(root: Path, manifest: Manifest, found: EdgePack, *, requirements: str) -> None:
    served = manifest.timing.served if manifest.timing else None
    one_process = served.one_process if served else found.target != "x86-64"
    names = {"name": manifest.name, "home": _HOME, "data": _DATA}
    facts = {"one_process": str(one_process).lower(), "python": found.python, "install": " ".join(found.install)}
    (root / "requirements.txt").write_text(requirements)
    for name in ("config.toml", "torchship.service", "README"):
        (root / name).write_text(plugins.rendered("torchship.artifact", f"{name}.j2", **names, **facts) + "\n")


def entries(root: Path, artifact: Artifact) -> tuple[FileEntry, ...]:
    """What a pack's manifest says of the files below `root`, those of `artifact` among them."""
    native = {f"artifact/{entry.path}" for entry in artifact.manifest.files if entry.kind == "native"}
    return tuple(
        FileEntry(path, folders.sha256(root, path), info.st_size, "native" if path in native else "data")
        for path, info in folders.files_below(root).items()
    )
