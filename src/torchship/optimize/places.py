"""Lines of code: whose they are, and what they say."""

from __future__ import annotations

import linecache
import sysconfig
from pathlib import Path

import msgspec


class Place(msgspec.Struct, frozen=True):
    """A line of someone's code."""

    file: str
    line: int
    function: str = ""
    code: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def place_at(file: str, line: int, function: str) -> Place:
    """The place with its line of code; an existing file is named by its whole path."""
    path = Path(file)
    shown = str(path.resolve()) if path.exists() else file
    return Place(shown, line, function, linecache.getline(shown, line).strip())


def is_users(file: str) -> bool:
    """Whether a file belongs neither to torch and its tools, nor to torchship, nor to Python itself."""
    if file.startswith("<") or not file.endswith(".py") or not Path(file).exists():
        return False
    path = str(Path(file).absolute())
    stdlib = sysconfig.get_path("stdlib")
    if path.startswith(stdlib) and "-packages" not in path:
        return False
    tools = ("torch", "onnx", "onnxscript", "torch_onnx", "numpy", "torchao", "functorch")
    packages = any(f"-packages/{name}/" in path for name in tools)
    return not packages and not path.startswith(str(Path(__file__).parents[1]))


def is_installed(file: str) -> bool:
    """Whether a file lies in an installed package, so that its user is not the one to edit it."""
    return "site-packages" in file or "dist-packages" in file
