"""The workspace of a search: a private folder in which a live module travels to the children, by cloudpickle.

The one place where pickle is used; docs/decisions/0003-workspace.md says why and under which rules.
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
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

from torchship.errors import CaptureFailed, Denied

_NEWCOMER = 60.0


@contextmanager
def private_folder(parent: Path) -> Iterator[Path]:
    """A new folder below `parent` that only this user may enter; removed afterwards, or by the next search."""
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in parent.glob("search-*"):
        try:
            with _held(left, fcntl.LOCK_NB) as descriptor:  # nobody holds it: its search was killed
                if time.time() - os.fstat(descriptor).st_mtime > _NEWCOMER:  # it is not about to be held
                    shutil.rmtree(left, ignore_errors=True)
        except OSError:
            continue
    folder = Path(tempfile.mkdtemp(prefix="search-", dir=parent))  # mkdtemp makes it 0700
    try:
        with _held(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _held(folder: Path, how: int = 0) -> Iterator[int]:
    """A folder under a lock that the kernel lets go of when this process dies, however it does. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | how)
        yield descriptor
    finally:
        os.close(descriptor)


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
                try:
                    default = {"default": Context().run(value.get)}
                except LookupError:
                    default = {}
                return partial(ContextVar, value.name, **default), ()
            if isinstance(value, torch.jit.ScriptModule):
                script = io.BytesIO()
                torch.jit.save(value, script)
                script.seek(0)
                return torch.jit.load, (script,)
            for kind, name in _EMPTY.items():
                if isinstance(value, kind):
                    return getattr(threading, name), ()
            return super().reducer_override(value)

    return Pickler(buffer)


_EMPTY = {type(threading.Lock()): "Lock", type(threading.RLock()): "RLock", threading.local: "local"}


def take(path: Path) -> Any:
    """Read what `put` wrote. Raises Denied unless file and folder belong to this user alone."""
    import pickle

    for place in (path, path.parent):
        info = place.lstat()
        if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077 or stat.S_ISLNK(info.st_mode):
            raise Denied(
                f"{place} is not private to this user", hint="a workspace is only read by the search that wrote it"
            )
    with path.open("rb") as file:
        return pickle.load(file)  # noqa: S301  # our own parent's file in a private folder
