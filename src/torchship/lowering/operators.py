"""Operators that come with other packages than torch: a saved program needs those packages imported before it loads."""

from __future__ import annotations

import re
import zipfile
from importlib import import_module
from pathlib import Path

from torchship.errors import Unavailable

_HOMES = {"torchvision": "torchvision", "torchao": "torchao", "torchaudio": "torchaudio"}
_CALL = re.compile(rb"\bops\.(\w+)\.")
_READ = (".json", ".py")


def register(path: Path) -> None:
    """Import the packages whose operators the torch archive at `path` calls. Raises Unavailable without one."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(_READ)]
        called = {word.decode() for name in names for word in _CALL.findall(archive.read(name))}
    for home in sorted({_HOMES[name] for name in called if name in _HOMES}):
        try:
            import_module(home)
        except ImportError as fault:
            raise Unavailable(
                f"{path.name} calls operators of {home}, which is not to be had: {fault}", hint=f"pip install {home}"
            ) from fault
