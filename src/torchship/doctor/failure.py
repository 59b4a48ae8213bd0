"""A Failure: what a route said when it gave up, and the lines of the user's own code that it points at."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Sequence

import msgspec

from torchship.optimize.places import Place, is_installed, is_users, place_at

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_FILE = re.compile(r'File "(?P<file>[^"\n]+)", line (?P<line>\d+)(?:, in (?P<function>[^\n,]+))?')
_CAUSED = re.compile(r"\(?(?P<file>[\w./\-]+\.py):(?P<line>\d+) in (?P<function>\w+)")
_LONGEST = 6000


class Failure(msgspec.Struct, frozen=True):
    """The type and text of an error and of its causes, and the lines of models' code that it names, innermost last."""

    kind: str
    text: str
    places: tuple[Place, ...] = ()

    @property
    def place(self) -> Place | None:
        """The innermost line of the user's own files; of an installed package where none is."""
        return innermost(self.places)


def innermost(places: Sequence[Place]) -> Place | None:
    """The last place in the user's own files, else the last at all."""
    own = [place for place in places if not is_installed(place.file)]
    return next(iter([*own[-1:], *places[-1:]]), None)


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
    return Failure(type(chain[0]).__name__, text, tuple(dict.fromkeys(found)))


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
    found = []
    for hit in _FILE.finditer(text):
        found.append((hit.start(), place_at(hit["file"], int(hit["line"]), (hit["function"] or "").strip())))
    found += [(hit.start(), place_at(hit["file"], int(hit["line"]), hit["function"])) for hit in _CAUSED.finditer(text)]
    return [place for _, place in sorted(found, key=lambda pair: pair[0])]
