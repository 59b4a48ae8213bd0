"""Zones, lines and dwell time: what confirmed tracks did, as Events; pure functions of where a camera's tracks were.

A track stands where its box ends below, in the middle: at the feet of who walks. Zones and lines have a margin, a share
of the box's height, that a track must pass before it has changed sides: a box that trembles on a line is counted once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import msgspec

from torchship.errors import BadConfig
from torchship_video.messages import Event, Track

Point: TypeAlias = tuple[float, float]
MARGIN = 0.05  # of a box's height
FORGET = 2.0  # seconds after which a track that is not seen has left


class ZoneConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[zone]]`: a polygon that tracks enter, dwell in and leave.

    `points` are its corners in a picture of `size` (width, height); the size (1, 1) makes them shares of the frame,
    whatever the stream's size. An empty `camera` means every camera, empty `labels` every label. `dwell` gives one
    event when a track has been inside for so many seconds; 0 gives none.
    """

    name: str
    points: tuple[Point, ...]
    size: Point = (1.0, 1.0)
    camera: str = ""
    labels: tuple[str, ...] = ()
    dwell: float = 0.0

    def __post_init__(self) -> None:
        _check(f"zone {self.name!r}", self.points, self.size)
        if len(self.points) < 3 or abs(_area(self.points)) < 1e-9 * self.size[0] * self.size[1]:
            raise BadConfig(
                f"zone {self.name!r}: a zone needs three corners that span an area, not {len(self.points)} on a line",
                hint="points = [[0.1, 0.1], [0.9, 0.1], [0.5, 0.9]]",
            )
        if not 0 <= self.dwell < math.inf:
            raise BadConfig(f"zone {self.name!r}: dwell is {self.dwell}", hint="seconds, or 0 for no such event")


class LineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[line]]`: a line that tracks cross, `in` or `out`.

    For who stands at `start` and looks to `end`, `in` is from the left to the right, `out` the other way.
    `size`, `camera` and `labels` are as of a zone.
    """

    name: str
    start: Point
    end: Point
    size: Point = (1.0, 1.0)
    camera: str = ""
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(f"line {self.name!r}", (self.start, self.end), self.size)
        if self.start == self.end:
            raise BadConfig(f"line {self.name!r}: it starts where it ends", hint="give it two different points")


@dataclass(slots=True)
class _Crossing:
    """A track and a line: the side it settled on (-1, 1; 0 is none yet), where it was, where it last changed sides."""

    side: int = 0
    last: Point | None = None
    met: bool = False  # the last change of sides was between the line's ends


@dataclass(slots=True)
class _Visit:
    """A track and a zone: since when it is inside, and whether its dwell event is out."""

    since: float | None = None
    told: bool = False


@dataclass(slots=True)
class _Past:
    """A track's past: `pending` are the events of the time before it was confirmed."""

    crossings: dict[int, _Crossing] = field(default_factory=dict)
    visits: dict[int, _Visit] = field(default_factory=dict)
    pending: list[Event] = field(default_factory=list)
    identity: int = 0
    seen: float = 0.0
    confirmed: bool = False


class Zones:
    """The zones and lines of one camera, with the past of its tracks."""

    def __init__(self, zones: Iterable[ZoneConfig] = (), lines: Iterable[LineConfig] = (), *, camera: str = "") -> None:
        """Of the zones and lines those of `camera` are kept, and those of every camera."""
        self.zones = tuple(zone for zone in zones if zone.camera in ("", camera))
        self.lines = tuple(line for line in lines if line.camera in ("", camera))
        names = [*(zone.name for zone in self.zones), *(line.name for line in self.lines)]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise BadConfig(
                f"two zones or lines are called {min(doubled)!r} on one camera",
                hint="events are told apart by the name",
            )
        self._past: dict[int, _Past] = {}
        self._time = -math.inf

    def update(self, tracks: Sequence[Track], *, time: float, size: tuple[int, int]) -> tuple[Event, ...]:
        """What happened up to `time` (seconds, growing) now that `tracks` stand where they do on a frame of `size`.

        Give it every track, unconfirmed ones too: what a track does before it is confirmed is told once it is.
        """
        if not self.zones and not self.lines:
            return ()
        events = list(self.close()) if time < self._time else []  # the stream began anew
        self._time = time
        for track in tracks:
            if track.number < 1:  # a tracker's mark of what is no track yet
                continue
            past = self._past.setdefault(track.number, _Past(seen=time))
            past.identity, past.confirmed = track.identity or past.identity, past.confirmed or track.confirmed
            if track.seen:
                past.seen = time
                self._move(past, track, time=time, size=size)
            if past.confirmed:
                events += past.pending
                past.pending.clear()
        for number in [number for number, past in self._past.items() if time - past.seen > FORGET]:
            past = self._past.pop(number)
            if past.confirmed:
                events += self._left(number, past)
        return tuple(events)

    def close(self) -> tuple[Event, ...]:
        """The stream has ended: every track leaves the zones that it is in."""
        gone, self._past = self._past, {}
        return tuple(event for number, past in gone.items() if past.confirmed for event in self._left(number, past))

    def inside(self) -> dict[str, int]:
        """How many confirmed tracks are in each zone now."""
        return {
            zone.name: sum(
                past.confirmed and index in past.visits and past.visits[index].since is not None
                for past in self._past.values()
            )
            for index, zone in enumerate(self.zones)
        }

    def _move(self, past: _Past, track: Track, *, time: float, size: tuple[int, int]) -> None:
        """A track stands at a new place."""
        left, top, right, bottom = track.box
        foot, margin = ((left + right) / 2, bottom), MARGIN * max(0.0, bottom - top)

        def tell(kind: Literal["in", "out", "enter", "leave", "dwell"], where: str, seconds: float = 0.0) -> None:
            past.pending.append(Event(kind, where, track.number, past.identity, round(seconds, 3)))

        for index, line in enumerate(self.lines):
            if line.labels and track.label not in line.labels:
                continue
            crossing = past.crossings.setdefault(index, _Crossing())
            start, end = _scaled(line.start, line.size, size), _scaled(line.end, line.size, size)
            if turn := _cross(crossing, foot, start, end, margin=margin):
                tell("in" if turn > 0 else "out", line.name)
        for index, zone in enumerate(self.zones):
            if zone.labels and track.label not in zone.labels:
                continue
            visit = past.visits.setdefault(index, _Visit())
            corners = [_scaled(point, zone.size, size) for point in zone.points]
            inside, near = _contains(corners, foot), _edge_distance(corners, foot) <= margin
            if visit.since is None and inside and not near:
                visit.since, visit.told = time, False
                tell("enter", zone.name)
            elif visit.since is not None and not inside and not near:
                tell("leave", zone.name, time - visit.since)
                visit.since = None
            if visit.since is not None and zone.dwell and not visit.told and time - visit.since >= zone.dwell:
                visit.told = True
                tell("dwell", zone.name, time - visit.since)

    def _left(self, number: int, past: _Past) -> list[Event]:
        return past.pending + [
            Event("leave", self.zones[index].name, number, past.identity, round(past.seen - visit.since, 3))
            for index, visit in past.visits.items()
            if visit.since is not None
        ]


def _cross(crossing: _Crossing, point: Point, start: Point, end: Point, *, margin: float) -> int:
    """1 when the point has now gone from the left of the line to its right, -1 for the other way, else 0."""
    where = _side(point, start, end)
    if crossing.last is not None:
        before = _side(crossing.last, start, end)
        if (before < 0) != (where < 0):
            share = before / (before - where)
            meeting = tuple(a + share * (b - a) for a, b in zip(crossing.last, point, strict=True))
            along = sum((m - s) * (e - s) for m, s, e in zip(meeting, start, end, strict=True))
            crossing.met = 0 <= along <= math.dist(start, end) ** 2
    crossing.last = point
    if abs(where) <= margin:
        return 0
    side = 1 if where > 0 else -1
    turned = crossing.side not in (0, side) and crossing.met
    crossing.side = side
    return side if turned else 0


def _side(point: Point, start: Point, end: Point) -> float:
    """How far a point is from the endless line, in pixels; positive to the right of who looks from start to end."""
    (x, y), (x1, y1), (x2, y2) = point, start, end
    return ((x2 - x1) * (y - y1) - (y2 - y1) * (x - x1)) / math.dist(start, end)


def _scaled(point: Point, size: Point, frame: tuple[int, int]) -> Point:
    return point[0] / size[0] * frame[0], point[1] / size[1] * frame[1]


def _contains(corners: Sequence[Point], point: Point) -> bool:
    """Whether a polygon holds a point: an odd number of its edges is to the right of it."""
    x, y = point
    odd = False
    for (x1, y1), (x2, y2) in _edges(corners):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
            odd = not odd
    return odd


def _edge_distance(corners: Sequence[Point], point: Point) -> float:
    """The least distance of a point from a polygon's edges."""
    found = math.inf
    for (x1, y1), (x2, y2) in _edges(corners):
        length = (x2 - x1) ** 2 + (y2 - y1) ** 2
        share = ((point[0] - x1) * (x2 - x1) + (point[1] - y1) * (y2 - y1)) / length if length else 0.0
        share = min(1.0, max(0.0, share))
        found = min(found, math.dist(point, (x1 + share * (x2 - x1), y1 + share * (y2 - y1))))
    return found


def _edges(corners: Sequence[Point]) -> Iterable[tuple[Point, Point]]:
    return zip(corners, (*corners[1:], corners[0]), strict=True)


def _area(corners: Sequence[Point]) -> float:
    return sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in _edges(corners)) / 2


def _check(what: str, points: Iterable[Point], size: Point) -> None:
    """Raises BadConfig where points lie outside the picture that they are measured in."""
    if not all(0 < side < math.inf for side in size):
        raise BadConfig(f"{what}: size is {list(size)}", hint="width and height of the picture that the points are of")
    for point in points:
        if not all(0 <= value <= side for value, side in zip(point, size, strict=True)):
            raise BadConfig(
                f"{what}: the point {list(point)} lies outside a picture of {list(size)}",
                hint="points are shares of the frame, or pixels of a picture whose size is given: size = [1920, 1080]",
            )
