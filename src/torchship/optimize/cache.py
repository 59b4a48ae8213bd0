"""The cache: what was built and proven before, by the content of model, data, recipe, versions and machine.

`$TORCHSHIP_CACHE` or `~/.cache/torchship`: `builds/KEY/` holds packed artifacts, `trials/KEY.json` their results.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from functools import cache as once
from pathlib import Path
from typing import Any

import msgspec
import torch

from torchship import __version__
from torchship.artifact import folder as folders
from torchship.hardware import version
from torchship.model import Model, to_numpy
from torchship.optimize.trial import Trial
from torchship.tensors import Tensors

_KEPT_BYTES = 20 * 2**30
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.Size)


class Cache:
    """Builds and trials below `root`. An entry appears whole or not at all; the oldest go beyond 20 GiB."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def built(self, key: str) -> Path | None:
        """The packed artifact of an earlier build."""
        path = self.root / "builds" / key
        if not (path / folders.MANIFEST).is_file():
            return None
        os.utime(path)
        return path

    def keep_build(self, key: str, folder: Path) -> Path:
        """Move a packed artifact into the cache."""
        path = self.root / "builds" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (path / folders.MANIFEST).is_file():
            shutil.rmtree(path, ignore_errors=True)
            try:
                os.replace(folder, path)
            except OSError:  # another search was faster
                if not path.is_dir():
                    raise
        return path

    def trial(self, key: str) -> Trial | None:
        """The result of an earlier trial whose artifact, if it had one, is still there."""
        path = self.root / "trials" / f"{key}.json"
        try:
            found = msgspec.json.decode(path.read_bytes(), type=Trial)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
        return None if found.artifact and not Path(found.artifact, folders.MANIFEST).is_file() else found

    def keep_trial(self, key: str, trial: Trial) -> None:
        """Remember a result."""
        folders.write(self.root / "trials" / f"{key}.json", msgspec.json.encode(trial))

    def trim(self, *, limit: int = _KEPT_BYTES) -> None:
        """Remove the builds that were not used for longest until the rest fits into `limit` bytes."""
        builds = sorted((self.root / "builds").glob("*"), key=lambda path: path.stat().st_mtime)
        sizes = {path: sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for path in builds}
        total = sum(sizes.values())
        for path in builds:
            if total <= limit or time.time() - path.stat().st_mtime < 3600:
                return
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]


def digest(*parts: object) -> str:
    """16 hex digits over the content of plain values."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else msgspec.json.encode(part, order="deterministic"))
        found.update(b"\0")
    return found.hexdigest()[:16]


def hash_tensors(batches: Iterable[Tensors]) -> str:
    """A hash of names, shapes, dtypes and content."""
    found = hashlib.sha256()
    for batch in batches:
        for name, array in batch.items():
            found.update(f"{name}{array.dtype}{array.shape}".encode())
            found.update(array.tobytes())
    return found.hexdigest()[:16]


def hash_model(model: Model) -> str:
    """A hash of weights, structure, plain attributes and the source of every class in the module."""
    found = hashlib.sha256()
    for name, tensor in [*model.module.named_parameters(), *model.module.named_buffers()]:
        found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(memoryview(_bytes(tensor)))
    sources = dict[str, str]()
    for name, part in model.module.named_modules():
        kind = type(part)
        plain = {key: repr(value) for key, value in vars(part).items() if _is_plain(value)}
        found.update(f"{name}:{kind.__module__}.{kind.__qualname__}:{sorted(plain.items())}".encode())
        sources.setdefault(f"{kind.__module__}.{kind.__qualname__}", _source(kind))
    found.update(repr(sorted(sources.items())).encode())
    found.update(str(model.signature).encode())
    return found.hexdigest()[:16]


def _bytes(tensor: torch.Tensor) -> Any:
    host: Any = to_numpy(tensor)
    return host.tobytes()


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions; a package that is not installed is left out."""
    found = {package: version(package) for package in packages}
    return {"torchship": __version__} | {package: text for package, text in found.items() if text}


@once
def own_code(plugin_names: tuple[str, ...]) -> str:
    """A hash of the code that builds with these backends and transforms, and measures: another torchship trusts no old
    results, and a change in one backend leaves the results of the others.
    """
    import torchship

    top = Path(torchship.__file__).parent
    measuring = [top / "optimize" / f"{name}.py" for name in ("trial", "measure", "capture", "flatten")]
    rooms = (top / "backends", top / "optimize" / "transforms")
    plugins = [room / f"{name}.py" for room in rooms for name in plugin_names]
    found = set[Path]()
    for path in (*measuring, *plugins):
        _follow(path, found, top)
    return digest(*(path.read_bytes() for path in sorted(found)))


def _follow(path: Path, found: set[Path], top: Path) -> None:
    """Add `path`, and what it imports of `lowering`."""
    if path in found or not path.is_file():
        return
    found.add(path)
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchship.lowering"):
            inside = [*(node.module or "").split(".")[2:3], *(alias.name for alias in node.names)]
            for name in inside:
                _follow(top / "lowering" / f"{name}.py", found, top)
