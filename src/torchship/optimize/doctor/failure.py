"""A Failure: what a route said when it gave up, and the lines of the user's own code that it points at."""

from __future__ import annotations

import linecache
import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import msgspec

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_FILE = re.compile(r'File "(?P<file>[^"\n]+)", line (?P<line>\d+)(?:, in (?P<function>[^\n,]+))?')
_CAUSED = re.compile(r"\(?(?P<file>[\w./\-]+\.py):(?P<line>\d+) in (?P<function>\w+)")
_LONGEST = 6000


class Place(msgspec.Struct, frozen=True):
    """A line of someone's code."""

    file: str
    line: int
    function: str = ""
    code: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Failure(msgspec.Struct, frozen=True):
    """The type and text of an error and of its causes, and the user's lines, innermost last."""

    kind: str
    text: str
    places: tuple[Place, ...] = ()


def of(fault: BaseException) -> Failure:
    """Take an exception apart: its causes too, and the places that its text names (exporters keep them only there)."""
    chain = list(_chain(fault))
    text = "\n".join(_ANSI.sub("", f"{type(link).__name__}: {link}") for link in chain)[:_LONGEST]
    from_text = [place for link in chain for place in places_in(_ANSI.sub("", str(link)))]
    from_frames = [
        place_at(frame.filename, frame.lineno or 0, frame.name)
        for link in chain
        for frame in traceback.extract_tb(link.__traceback__)
    ]
    found = [place for place in (*from_frames, *from_text) if is_users(place.file)]
    own = [place for place in found if not is_installed(place.file)]
    return Failure(type(chain[0]).__name__, text, tuple(dict.fromkeys(own or found)))


def _chain(fault: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while fault is not None and id(fault) not in seen and len(seen) < 6:
        seen.add(id(fault))
        yield fault
        fault = fault.__cause__ or (None if fault.__suppress_context__ else fault.__context__)


def places_in(text: str) -> list[Place]:
    """Every place that an error's text names, in the order of the text."""
    found = []
    for hit in _FILE.finditer(text):
        found.append((hit.start(), place_at(hit["file"], int(hit["line"]), (hit["function"] or "").strip())))
    found += [(hit.start(), place_at(hit["file"], int(hit["line"]), hit["function"])) for hit in _CAUSED.finditer(text)]
    return [place for _, place in sorted(found, key=lambda pair: pair[0])]


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
    return not packages and not path.startswith(str(Path(__file__).parents[2]))


def is_installed(file: str) -> bool:
    """Whether a file lies in an installed package, so that its user is not the one to edit it."""
    return "site-packages" in file or "dist-packages" in file
