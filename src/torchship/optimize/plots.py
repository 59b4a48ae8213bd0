"""Small plots as inline SVG that take their colours from the page: scatter, lines and bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from torchship.plugins import rendered

COLOURS = 8  # the page defines --c0 to --c7


@dataclass(frozen=True)
class Mark:
    """Points in one colour (a number), which stand out where they are `strong`; `names`: of each, if they have some."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    strong: bool = False
    hollow: bool = False
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels: logarithmically, or from zero on in equal steps (`even`)."""

    low: float
    high: float
    start: float
    end: float
    even: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, even: bool = False) -> Scale:
        """One that has room for all `values`."""
        if even:
            return cls(0.0, max(*values, 1e-12) * 1.05, start, end, even)
        return cls(max(min(values), 1e-12) / 1.35, max(*values, 1e-12) * 1.35, start, end)

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        if self.even:
            return round(self.start + (self.end - self.start) * value / self.high, 1)
        low, high, value = (math.log10(max(v, 1e-12)) for v in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * (value - low) / ((high - low) or 1.0), 1)

    def ticks(self) -> list[float]:
        """Round values inside the range: decades, with 2 and 5 where there are few; or steps of such a value."""
        if self.even:
            least = self.high / 8
            decade = 10.0 ** math.floor(math.log10(least))
            step = next(step * decade for step in (1, 2, 5, 10) if step * decade >= least)
            return [step * count for count in range(math.floor(self.high / step) + 1)]
        decades = range(math.floor(math.log10(max(self.low, 1e-12))), math.ceil(math.log10(self.high)) + 1)
        steps: tuple[int, ...] = (1, 2, 5) if len(decades) <= 3 else (1,)
        found = [step * 10.0**power for power in decades for step in steps]
        found = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
        return found[:: math.ceil(len(found) / 8)] if found else [self.low, self.high]


def number(value: float) -> str:
    """A short text: 12k, 0.05, 1e-07."""
    for limit, word in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{word}"
    return f"{value:.3g}"


def plot(
    marks: Sequence[Mark], *, x_title: str, y_title: str, joined: bool = False, until: float | None = None
) -> Markup:
    """Marks on logarithmic axes; nothing without any point.

    Each by itself, with the Pareto front drawn through the filled ones that no other beats in both; or each `joined` by
    a line, whose points tell their values on hover. Where x is a time, values hold from their moment on, `until` the
    end: lines are stairs, and time goes evenly.
    """
    points = [point for mark in marks for point in mark.points]
    if not points:
        return Markup()
    frame = {"width": 520, "height": 320, "left": 78, "right": 504, "top": 14, "bottom": 276}
    ends = [] if until is None else [until]
    x = Scale.over([*(a for a, _ in points), *ends], frame["left"], frame["right"], even=bool(ends))
    y = Scale.over([b for _, b in points], frame["bottom"], frame["top"])
    return rendered(
        "torchship.optimize",
        "plot.svg.j2",
        **frame,
        x=x,
        y=y,
        x_ticks=sorted({a for a, _ in points}) if joined and not ends else x.ticks(),
        x_title=x_title,
        y_title=y_title,
        number=number,
        marks=[(mark, stairs(mark.points, until)) for mark in sorted(marks, key=lambda mark: mark.strong)],
        joined=joined,
        front=[] if joined else front([point for mark in marks if not mark.hollow for point in mark.points]),
    )


def stairs(points: Sequence[tuple[float, float]], until: float | None) -> Sequence[tuple[float, float]]:
    """The line through points; where there is an end, each value holds up to the next, and the last one to the end."""
    if until is None:
        return points
    ends = [*(a for a, _ in points[1:]), until]
    return [corner for (a, b), end in zip(points, ends, strict=True) for corner in ((a, b), (end, b))]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in both coordinates (smaller is better), by rising x."""
    found: list[tuple[float, float]] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def bars(values: Sequence[tuple[str, float, bool]], *, unit: str) -> Markup:
    """Horizontal bars: name, value, and whether to mark it."""
    if not values:
        return Markup()
    top = max(value for _, value, _ in values) or 1.0
    return rendered("torchship.optimize", "bars.svg.j2", width=520, bars=values, top=top, number=number, unit=unit)
