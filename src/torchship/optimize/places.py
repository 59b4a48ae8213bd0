"""Lines of code: whose they are, and what they say."""

from __future__ import annotations

import linecache
import sys
import sysconfig
import traceback
from pathlib import Path
from types import FrameType

import msgspec

_TOOLS = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "torch_onnx",
    "openvino",
    "nncf",
    "numpy",
    "torchao",
    "functorch",
)
_EDGE = str(Path(__file__).with_name("flatten.py"))  # it calls the user's module


class Place(msgspec.Struct, frozen=True):
    """A line of someone's code."""

    file: str
    line: int
    function: str = ""
    code: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


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
    packages = any(f"-packages/{name}/" in path for name in _TOOLS)
    return not packages and not path.startswith(str(Path(__file__).parents[1]))


def is_installed(file: str) -> bool:
    """Whether a file lies in an installed package, so that its user is not the one to edit it."""
    return "site-packages" in file or "dist-packages" in file


def innermost(fault: BaseException) -> Place | None:
    """The innermost line of the user's own code, or of a package's, that an error came through."""
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(fault.__traceback__)]
    users = [place_at(code.co_filename, line, code.co_name) for code, line in frames if is_users(code.co_filename)]
    own = [place for place in users if not is_installed(place.file)]
    return (own or users)[-1] if users else None


def place_now() -> Place | None:
    """The innermost line of the model's forward that is neither torch's nor ours: the user's, or a package's.

    None where torch itself is all that runs; who called us, further out on the stack, is not the model.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _EDGE:
        if is_users(frame.f_code.co_filename):
            return place_at(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back
    return None
