"""A Failure: what a route said when it gave up, and the lines of the user's own code that it points at."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

import msgspec

from torchship.optimize.places import Place, is_installed, is_users, place_at

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_FILE = re.compile(r'File "(?P<file>[^"\n]+)", line (?P<line>\d+)(?:, in (?P<function>[^\n,]+))?')
_CAUSED = re.compile(r"\(?(?P<file>[\w./\-]+\.py):(?P<line>\d+) in (?P<function>\w+)")
_LONGEST = 6000


class Failure(msgspec.Struct, frozen=True):
    """The type and text of an error and of its causes, and the lines of models' code that it names, innermost last.

    `words` and `hint` are those of the error alone.
    """

    kind: str
    text: str
    places: tuple[Place, ...] = ()
    words: str = ""
    hint: str = ""

    @property
    def place(self) -> Place | None:
        """The innermost line of the user's own files; of an installed package where none is."""
        own = [place for place in self.places if not is_installed(place.file)]
        return next(iter([*own[-1:], *self.places[-1:]]), None)


def of(fault: BaseException) -> Failure:
    """Take an exception apart: its causes too, and the places that its text names (exporters keep them only there)."""
    chain = list(_chain(fault))
    text = "\n".join(_ANSI.sub("", f"{type(link).__name__}: {link}") for link in chain)[:_LONGEST]
    from_text = [place for link in chain for place in places_in(_ANSI.sub("", str(link)))]
    from_frames = [
        place_at(frame.f_code.co_filename, line, frame.f_code.co_name)
        for link in chain
        for frame, line in traceback.walk_tb(link.__traceback__)
    ]
    from_nodes = [place for link in chain for place in _translated(link)]
    found = [place for place in (*from_frames, *from_text, *from_nodes) if is_users(place.file)]
    hint = getattr(fault, "hint", "")
    return Failure(type(fault).__name__, text, tuple(dict.fromkeys(found)), str(fault), hint)


def _translated(fault: BaseException) -> list[Place]:
    """The user's lines behind the graph node that a translator (ONNX's) was at: only the node itself knows them."""
    nodes = [frame.f_locals.get("node") for frame, _ in traceback.walk_tb(fault.__traceback__)]
    traces = (getattr(node, "meta", {}).get("stack_trace") for node in nodes)
    return [place for trace in dict.fromkeys(traces) if isinstance(trace, str) for place in places_in(trace)]


def _chain(fault: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while fault is not None and id(fault) not in seen and len(seen) < 6:
        seen.add(id(fault))
        yield fault
        fault = fault.__cause__ or (None if fault.__suppress_context__ else fault.__context__)


def places_in(text: str) -> list[Place]:
    """Every place that an error's text names, in the order of the text."""
    hits = [hit for pattern in (_FILE, _CAUSED) for hit in pattern.finditer(text)]
    hits.sort(key=lambda hit: hit.start())
    return [place_at(hit["file"], int(hit["line"]), (hit["function"] or "").strip()) for hit in hits]
