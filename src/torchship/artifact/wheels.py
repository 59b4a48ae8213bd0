"""The Python packages that serve an artifact, as wheels for another machine: chosen here, installed there offline."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from torchship import hardware
from torchship.artifact.manifest import Manifest
from torchship.errors import BadConfig, BuildFailed, Unavailable

# What runs a backend's artifacts, beside the base install. The others need torch.
_RUNTIMES: dict[str, tuple[str, ...]] = {"onnxruntime": (), "ncnn": ("ncnn",), "openvino": ("openvino",)}
# Newest glibc first; a Raspberry Pi with Debian 12 has 2.36. manylinux2014 is 2.17 (PEP 600).
_GLIBC = ("2_35", "2_34", "2_31", "2_28", "2_27", "2_26", "2_24", "2_17")


def requirements(models: list[Manifest]) -> list[str]:
    """The base install and what runs `models`, each with the version that is installed here.

    Raises BadConfig for a model whose backend needs torch, Unavailable where torchship is run from bare source.
    """
    names = {*base(), "cryptography"}  # signatures of what comes later are checked on the machine
    for manifest in models:
        recipe = manifest.fallback or manifest.recipe
        if recipe.backend not in _RUNTIMES:
            raise BadConfig(
                f"{manifest.name!r} runs by {recipe.backend}, which needs torch: too much for a small machine",
                hint=f"optimize it with one of the backends {', '.join(_RUNTIMES)}",
            )
        names.update(_RUNTIMES[recipe.backend])
    found = {name: hardware.version(name).partition("+")[0] for name in sorted(names)}
    return [f"{name}=={number}" if number else name for name, number in found.items()]


def base() -> list[str]:
    """The names of the packages that the base install needs."""
    try:
        needs = metadata.requires("torchship") or []
    except metadata.PackageNotFoundError:
        raise Unavailable("torchship is not installed here", hint="pip install it, a checkout with -e") from None
    return [re.split(r"[^\w.-]", need, maxsplit=1)[0] for need in needs if "extra ==" not in need]


def download(wanted: list[str], *, machine: str, python: str, to: Path) -> None:
    """Download wheels of `wanted`, and of all that they need, for Linux on `machine` ("aarch64") and `python` ("3.13").

    pip asks the registry that it is configured for. Raises BuildFailed with its words, Unavailable without pip.
    """
    if importlib.util.find_spec("pip") is None:
        raise Unavailable("wheels are downloaded by pip, which is not installed here", hint="python -m ensurepip")
    words = [*_pip("download", machine=machine, python=python), "--dest", str(to)]
    done = subprocess.run([*words, *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or [done.stderr.strip()[-300:]]
        raise BuildFailed(
            f"no wheels for {machine} and Python {python}: {said[-1].removeprefix('ERROR: ')}",
            hint="see that the registry can be reached, try another --python, or pack with --no-wheels",
        )


def install(requirements: list[str], *, folder: Path, machine: str, python: str, to: Path) -> None:
    """Install for another machine into the new folder `to`, by arguments of `pip install` that hold in `folder`.

    Raises Unavailable with the words of pip.
    """
    words = [*_pip("install", machine=machine, python=python), "--target", str(to), *requirements]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"the packages do not install: {done.stderr.strip()[-300:]}", hint="make the pack again")


def _pip(verb: str, *, machine: str, python: str) -> list[str]:
    """pip, for wheels of a Linux `machine` and of `python`."""
    words = [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check", "--no-input"]
    words += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    platforms = (*(f"manylinux_{glibc}_{machine}" for glibc in _GLIBC), f"manylinux2014_{machine}")
    return [*words, *(f"--platform={platform}" for platform in platforms)]


def locked(folder: Path) -> str:
    """The content of a requirements file that admits exactly the wheels in `folder`, by version and hash."""
    lines = []
    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        lines.append(f"{name.replace('_', '-')}=={version} --hash=sha256:{digest}\n")
    return "".join(lines)


def ours(to: Path) -> Path:
    """Write the torchship that runs here as a wheel into the folder `to`: equal source gives an equal file.

    Source: the binary distribution format of packaging.python.org. Raises Unavailable where it is not installed.
    """
    try:
        found = metadata.distribution("torchship")
    except metadata.PackageNotFoundError:
        raise Unavailable("torchship is not installed here", hint="pip install it, a checkout with -e") from None
    source, info = Path(__file__).parents[1], f"torchship-{found.version}.dist-info"
    files = {
        f"torchship/{path.relative_to(source).as_posix()}": path.read_bytes()
        for path in sorted(source.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    for name in ("METADATA", "entry_points.txt", "licenses/LICENSE"):
        if (text := found.read_text(name)) is not None:
            files[f"{info}/{name}"] = text.encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: torchship\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = io.StringIO()
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        record.write(f"{name},sha256={digest},{len(data)}\n")
    record.write(f"{info}/RECORD,,\n")
    files[f"{info}/RECORD"] = record.getvalue().encode()
    target = to / f"torchship-{found.version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as wheel:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16
            wheel.writestr(entry, data)
    return target
