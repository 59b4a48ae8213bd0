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
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from torchship import home
from torchship.errors import CorruptArtifact, NotFound, Unavailable


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One file of weights: the package that carries it, where in it, and the SHA-256 of the bytes.

    `package_sha256` is that of the package's own file, checked before anything in it is looked at (PyPI).
    """

    name: str
    registry: str
    package: str
    version: str
    package_sha256: str = ""
    member: str
    sha256: str
    licence: str
    about: str

    @property
    def path(self) -> Path:
        """Where the file lies once it is fetched."""
        suffix = ".dat" if self.member.endswith(".dat") else ".onnx"
        return folder() / f"{self.name}{suffix}"


_ROWS = tomllib.loads(resources.files("torchship_faces").joinpath("weights.toml").read_text())
WEIGHTS = {name: Weights(name=name, **row) for name, row in _ROWS.items()}
_PICTURES = "5e5efdd1686aa566af0d3cc1313b131e4b197657a8ffd03669e6d3fad92705ec"


def folder() -> Path:
    """Where weights are kept: `$TORCHSHIP_CACHE/weights`, else `~/.cache/torchship/weights`."""
    return home.folder("TORCHSHIP_CACHE", ".cache", "torchship") / "weights"


def fetch(name: str, *, tell: Callable[[str], None] = lambda _: None) -> Path:
    """The file of these weights, fetched once and checked every time.

    Raises NotFound for an unknown name, Unavailable when the registry's client is missing or fails,
    CorruptArtifact when the bytes are not the pinned ones.
    """
    if name not in WEIGHTS:
        raise NotFound(f"unknown weights {name!r}", hint=f"use one of {', '.join(WEIGHTS)}")
    wanted = WEIGHTS[name]
    path = wanted.path
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == wanted.sha256:
        return path
    tell(f"fetching {wanted.package} {wanted.version} from {wanted.registry} ({wanted.about})")
    with tempfile.TemporaryDirectory(prefix="torchship-weights-") as scratch:
        if wanted.registry == "npm":
            archive = _from_npm(wanted, Path(scratch))
        else:
            pinned, source = f"{wanted.package}=={wanted.version}", wanted.member.endswith(".dat")
            archive = _pip_download(pinned, wanted.package_sha256, Path(scratch), source=source)
        data = next((data for _, data in _members(archive, wanted.member)), b"")
    data = _bytes_literal(data) if wanted.member.endswith(".py") else data
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

    Raises Unavailable.
    """
    folder_ = folder().parent / "pictures" / "face-recognition-1.3.0"
    if folder_.is_dir():
        return folder_
    tell("fetching the test pictures of face-recognition 1.3.0 from pypi")
    with tempfile.TemporaryDirectory(prefix="torchship-pictures-") as scratch:
        archive = _pip_download("face-recognition==1.3.0", _PICTURES, Path(scratch), source=True)
        ready = Path(scratch) / "pictures"
        ready.mkdir()
        for name, data in _members(archive, "/tests/test_images/"):
            (ready / Path(name).name).write_bytes(data)
        folder_.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(ready, folder_, dirs_exist_ok=True)
    return folder_


def _members(archive: Path, wanted: str) -> Iterator[tuple[str, bytes]]:
    """The files of a wheel or a tarball whose path holds `wanted`."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist() if wanted in name)
        return
    with tarfile.open(archive) as tarball:
        for member in tarball:
            found = tarball.extractfile(member) if wanted in member.name else None
            if found is not None:
                yield member.name, found.read()


def _pip_download(requirement: str, sha256: str, scratch: Path, *, source: bool) -> Path:
    """A package as its registry has it. pip runs the setup.py of a source package: only after the hash was checked."""
    pins = scratch / "pins.txt"
    pins.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    environment = dict(os.environ)
    if find_spec("pip") is None:
        uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
        if uv is None:
            raise Unavailable("neither pip nor uv is at hand to fetch weights", hint="python -m ensurepip")
        _run([uv, "pip", "install", "-q", "--target", str(scratch / "pip"), "pip"])
        environment["PYTHONPATH"] = str(scratch / "pip")
    kind = ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-r", str(pins)]
    _run([*command, *kind, "-d", str(scratch / "got")], environment=environment)
    return next((scratch / "got").iterdir())


def _bytes_literal(text: bytes) -> bytes:
    """The one bytes constant that a module assigns, read without running it."""
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            value = statement.value.value
            if isinstance(value, bytes):
                return value
    raise CorruptArtifact("the package holds no weights where they were expected")


def _from_npm(wanted: Weights, scratch: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable(
            f"npm is needed to fetch {wanted.package}", hint=f"install Node's npm, or put the file at {wanted.path}"
        )
    _run([npm, "pack", "--silent", f"{wanted.package}@{wanted.version}"], cwd=scratch)
    return next(scratch.glob("*.tgz"))


def _run(command: list[str], *, cwd: Path | None = None, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise Unavailable(f"{Path(command[0]).name} failed: {lines[-1]}", hint="is the package registry reachable?")
