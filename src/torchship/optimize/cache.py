"""The cache: what was built and proven before, by the content of model, data, recipe, versions and machine.

`$TORCHSHIP_CACHE` or `~/.cache/torchship`: `builds/KEY/` holds packed artifacts, `trials/KEY.json` their results.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache as once
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from torchship import __version__
from torchship.artifact import folder as folders
from torchship.hardware import version
from torchship.model import Model, to_numpy
from torchship.optimize.trial import Trial
from torchship.tensors import Tensors

T = TypeVar("T")
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

    def kept(self, kind: str, key: str, type: type[T]) -> T | None:
        """What was kept as `kind` under a key; None where that is nothing, or nothing that can be read."""
        try:
            return msgspec.json.decode((self.root / kind / f"{key}.json").read_bytes(), type=type)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def keep(self, kind: str, key: str, value: object) -> None:
        """Remember a result."""
        folders.write(self.root / kind / f"{key}.json", msgspec.json.encode(value))

    def trial(self, key: str) -> Trial | None:
        """The result of an earlier trial whose artifact, if it had one, is still there."""
        found = self.kept("trials", key, Trial)
        return None if found and found.artifact and not Path(found.artifact, folders.MANIFEST).is_file() else found

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
        found.update(to_numpy(tensor).tobytes())
    sources = dict[str, str]()
    for name, part in model.module.named_modules():
        kind = f"{type(part).__module__}.{type(part).__qualname__}"
        plain = {key: repr(value) for key, value in vars(part).items() if _is_plain(value)}
        found.update(f"{name}:{kind}:{sorted(plain.items())}".encode())
        if kind not in sources:
            sources[kind] = ""
            with contextlib.suppress(OSError, TypeError):  # it was not written in Python, or its file is gone
                sources[kind] = inspect.getsource(type(part))
    found.update(repr(sorted(sources.items())).encode())
    found.update(str(model.signature).encode())
    return found.hexdigest()[:16]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def hash_function(function: Callable[..., Any]) -> str:
    """A hash of a function's source and defaults, or of its pickle where it has no source."""
    try:
        return digest(inspect.getsource(function), repr(getattr(function, "__defaults__", None)))
    except (OSError, TypeError):
        import cloudpickle

        data: bytes = cloudpickle.dumps(function)
        return digest(data)


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
    plugged = [path for room in rooms for name in plugin_names if (path := room / f"{name}.py").is_file()]
    return digest(
        *(path.read_bytes() for path in (*measuring, *sorted(plugged), *sorted(top.glob("lowering/**/*.py"))))
    )
