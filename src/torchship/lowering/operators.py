"""Operators that come with other packages than torch: a saved program needs those packages imported before it loads."""

from __future__ import annotations

import re
import zipfile
from importlib import import_module
from pathlib import Path

from torchship.errors import Unavailable

_HOMES = {"torchvision": "torchvision", "torchao": "torchao", "torchaudio": "torchaudio"}
_CALL = re.compile(rb"\bops\.(\w+)\.")
_TARGET = re.compile(rb'(?<!\\)"torch\.ops\.(\w+)\.')  # of a node; lines of the user's code are there too
_READ = (".json", ".py")


def register(path: Path) -> None:
    """Import the packages whose operators the torch archive at `path` calls.

    Raises Unavailable without one, and for operators of the user's own that nothing has defined yet.
    """
    import torch

    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(_READ)]
        text = b"\n".join(map(archive.read, names))
    called = {word.decode() for word in _CALL.findall(text)}
    for home in sorted({_HOMES[name] for name in called if name in _HOMES}):
        try:
            import_module(home)
        except ImportError as fault:
            raise Unavailable(
                f"{path.name} calls operators of {home}, which is not to be had: {fault}", hint=f"pip install {home}"
            ) from fault
    known = {name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names()} | {"higher_order"}
    if unknown := sorted({word.decode() for word in _TARGET.findall(text)} - known):  # TorchScript says so itself
        raise Unavailable(
            f"{path.name} calls operators of {unknown[0]!r}, which nothing has registered in this process",
            hint="import the module that defines them before the artifact is opened",
        )
