"""The capsule: how a live module travels to the children of its own search, by cloudpickle in a private folder.

The one place where pickle is used; docs/decisions/0003-capsule.md says why and under which rules.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar
from pathlib import Path
from types import CodeType
from typing import Any

from torchship.errors import CaptureFailed, Denied

_NEWCOMER = 60.0


@contextmanager
def private_folder(parent: Path) -> Iterator[Path]:
    """A new folder below `parent` that only this user may enter; removed afterwards, or by the next search."""
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix="search-", dir=parent))  # mkdtemp makes it 0700
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)  # the kernel lets go of it when this process dies, however it does
        yield folder
    finally:
        os.close(held)
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove what searches left behind that were killed: nobody holds it, and it is no newcomer about to be held."""
    for folder in parent.glob("search-*"):
        try:
            held = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(held).st_mtime > _NEWCOMER:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(held)


def put(path: Path, value: Any, *, what: str) -> None:
    """Write `value` for a child of this process. Raises CaptureFailed when it cannot be pickled."""
    buffer = io.BytesIO()
    try:
        _pickler(buffer).dump(value)
    except Exception as fault:
        raise CaptureFailed(
            f"{what} cannot be sent to a child process: {type(fault).__name__}: {' '.join(str(fault).split())[:300]}",
            hint="define its classes and functions at the top of a module, and hold no open files or locks",
        ) from fault
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(buffer.getbuffer())


def _pickler(buffer: io.BytesIO) -> Any:
    """cloudpickle's, where code keeps the name of its file, and what has no content of its own is made anew."""
    import cloudpickle
    import torch

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, CodeType):
                # cloudpickle writes <dynamic-code>: lines could not be named, nor a script's source be found again
                make, arguments = self.dispatch_table[CodeType](value)
                return make, tuple(value.co_filename if item == "<dynamic-code>" else item for item in arguments)
            if isinstance(value, ContextVar):
                return _context_variable, (value.name, *Context().run(_default, value))
            if isinstance(value, torch.jit.ScriptModule):
                script = io.BytesIO()
                torch.jit.save(value, script)
                return _script, (script.getvalue(),)
            for kind, name in _EMPTY.items():
                if isinstance(value, kind):
                    return getattr(threading, name), ()
            return super().reducer_override(value)

    return Pickler(buffer)


_EMPTY = {type(threading.Lock()): "Lock", type(threading.RLock()): "RLock", threading.local: "local"}


def _default(variable: ContextVar[Any]) -> tuple[Any, ...]:
    try:
        return (variable.get(),)
    except LookupError:
        return ()


def _script(data: bytes) -> Any:
    import torch

    return torch.jit.load(io.BytesIO(data))  # type: ignore[no-untyped-call]


def _context_variable(name: str, *default: Any) -> ContextVar[Any]:
    return ContextVar(name, default=default[0]) if default else ContextVar(name)


def take(path: Path) -> Any:
    """Read what `put` wrote. Raises Denied unless file and folder belong to this user alone."""
    import pickle

    for place in (path, path.parent):
        info = place.lstat()
        if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077 or stat.S_ISLNK(info.st_mode):
            raise Denied(f"{place} is not private to this user", hint="a capsule is only read where it was written")
    with path.open("rb") as file:
        return pickle.load(file)  # noqa: S301  # our own parent's file in a private folder
