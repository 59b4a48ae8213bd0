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
    """Points in one colour (a number), which stand out where they are `strong`."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    strong: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, logarithmically."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> Scale:
        """One that has room for all `values`."""
        return cls(max(min(values), 1e-12) / 1.35, max(*values, 1e-12) * 1.35, start, end)

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (math.log10(max(v, 1e-12)) for v in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * (value - low) / ((high - low) or 1.0), 1)

    def ticks(self) -> list[float]:
        """Round values inside the range: decades, with 2 and 5 where there are few."""
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


def plot(marks: Sequence[Mark], *, x_title: str, y_title: str, joined: bool = False) -> Markup:
    """Marks on logarithmic axes; nothing without any point.

    Each by itself, with the Pareto front drawn through the filled ones that no other beats in both; or each `joined` by
    a line, whose points tell their values on hover.
    """
    points = [point for mark in marks for point in mark.points]
    if not points:
        return Markup()
    frame = {"width": 520, "height": 320, "left": 78, "right": 504, "top": 14, "bottom": 276}
    x = Scale.over([a for a, _ in points], frame["left"], frame["right"])
    y = Scale.over([b for _, b in points], frame["bottom"], frame["top"])
    return rendered(
        "torchship.optimize",
        "plot.svg.j2",
        **frame,
        x=x,
        y=y,
        x_ticks=sorted({a for a, _ in points}) if joined else x.ticks(),
        x_title=x_title,
        y_title=y_title,
        number=number,
        marks=sorted(marks, key=lambda mark: mark.strong),
        joined=joined,
        front=[] if joined else front([point for mark in marks if not mark.hollow for point in mark.points]),
    )


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
