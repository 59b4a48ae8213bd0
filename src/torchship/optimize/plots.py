"""Small plots as inline SVG that take their colours from the page: scatter, lines and bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from torchship.plugins import rendered

_WIDTH, _HEIGHT = 520, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 16, 14, 44
COLOURS = 8  # the page defines --c0 to --c7


@dataclass(frozen=True)
class Dot:
    """One mark: position, its word, colour number, and whether it stands out or is hollow."""

    x: float
    y: float
    label: str
    colour: int = 0
    strong: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Series:
    """One named series."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    strong: bool = False


@dataclass(frozen=True)
class _Point:
    """One circle of radius `r`, with the text that it shows on hover."""

    x: float
    y: float
    r: float
    label: str
    look: str = "dot"
    ring: bool = False


@dataclass(frozen=True)
class _Mark:
    """A line through `path`, where there is one, and circles, in one colour."""

    look: str
    colour: int
    path: str = ""
    points: Sequence[_Point] = ()


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, logarithmically."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (math.log10(max(v, 1e-12)) for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1.0)

    def ticks(self) -> list[float]:
        """Round values inside the range: decades, with 2 and 5 where there are few."""
        decades = range(math.floor(math.log10(max(self.low, 1e-12))), math.ceil(math.log10(self.high)) + 1)
        steps: tuple[int, ...] = (1, 2, 5) if len(decades) <= 3 else (1,)
        found = [step * 10.0**power for power in decades for step in steps]
        found = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
        return found[:: math.ceil(len(found) / 8)] if found else [self.low, self.high]


def _scale(values: Sequence[float], start: float, end: float) -> Scale:
    return Scale(max(min(values), 1e-12) / 1.35, max(*values, 1e-12) * 1.35, start, end)


def number(value: float) -> str:
    """A short text: 12k, 0.05, 1e-07."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, word in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{word}"
    return f"{value:.3g}"


def _drawn(x: Scale, y: Scale, marks: list[_Mark], *, x_ticks: Sequence[float] = (), **titles: str) -> Markup:
    places = {"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _WIDTH - _RIGHT, "top": _TOP}
    return rendered(
        "torchship.optimize",
        "plot.svg.j2",
        **places,
        **titles,
        bottom=_HEIGHT - _BOTTOM,
        marks=marks,
        x_ticks=[(_pixel(x(tick)), number(tick)) for tick in x_ticks or x.ticks()],
        y_ticks=[(_pixel(y(tick)), number(tick)) for tick in y.ticks()],
    )


def _pixel(value: float) -> float:
    return round(value, 1)


def _path(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    return " ".join(f"{_pixel(x(a))},{_pixel(y(b))}" for a, b in points)


def scatter(dots: Sequence[Dot], *, x_title: str, y_title: str) -> Markup:
    """Dots on logarithmic axes, the Pareto front drawn through those that no other beats in both."""
    if not dots:
        return Markup()
    x = _scale([dot.x for dot in dots], _LEFT, _WIDTH - _RIGHT)
    y = _scale([dot.y for dot in dots], _HEIGHT - _BOTTOM, _TOP)
    best = front([(dot.x, dot.y) for dot in dots if not dot.hollow])
    marks = [_Mark("front", 0, _path(best, x, y))] if len(best) > 1 else []
    for dot in sorted(dots, key=lambda dot: dot.strong):
        look = "dot hollow" if dot.hollow else "dot"
        point = _Point(_pixel(x(dot.x)), _pixel(y(dot.y)), 5.5, dot.label, look, ring=dot.strong)
        marks.append(_Mark("", dot.colour % COLOURS, points=[point]))
    return _drawn(x, y, marks, x_title=x_title, y_title=y_title)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in both coordinates (smaller is better), by rising x."""
    found: list[tuple[float, float]] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def lines(series: Sequence[Series], *, x_title: str, y_title: str) -> Markup:
    """Series on logarithmic axes, each point with its value on hover."""
    points = [point for line in series for point in line.points]
    if not points:
        return Markup()
    x = _scale([a for a, _ in points], _LEFT, _WIDTH - _RIGHT)
    y = _scale([b for _, b in points], _HEIGHT - _BOTTOM, _TOP)
    marks = [
        _Mark(
            "line strong" if line.strong else "line",
            line.colour % COLOURS,
            _path(line.points, x, y),
            [
                _Point(_pixel(x(a)), _pixel(y(b)), 3, f"{line.label}: {number(b)} at {number(a)}")
                for a, b in line.points
            ],
        )
        for line in sorted(series, key=lambda line: line.strong)
    ]
    return _drawn(x, y, marks, x_ticks=sorted({a for a, _ in points}), x_title=x_title, y_title=y_title)


def bars(values: Sequence[tuple[str, float, bool]], *, unit: str) -> Markup:
    """Horizontal bars: name, value, and whether to mark it."""
    if not values:
        return Markup()
    top = max(value for _, value, _ in values) or 1.0
    shown = [
        {
            "name": name,
            "short": name if len(name) <= 34 else "…" + name[-33:],
            "width": _pixel(max(2.0, 250 * max(value, 0.0) / top)),
            "value": f"{number(value)} {unit}",
            "marked": marked,
        }
        for name, value, marked in values
    ]
    return rendered("torchship.optimize", "bars.svg.j2", width=_WIDTH, bars=shown)
