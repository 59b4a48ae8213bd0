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
