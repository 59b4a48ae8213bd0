"""Small plots as inline SVG that take their colours from the page: scatter, lines and bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

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
class Scale:
    """Maps values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (self._fold(v) for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1.0)

    def _fold(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.log else value

    def ticks(self) -> list[float]:
        """Round values inside the range: decades (with 2 and 5 where few), or steps of 1, 2 or 5."""
        if self.log:
            decades = range(math.floor(math.log10(max(self.low, 1e-12))), math.ceil(math.log10(self.high)) + 1)
            steps: tuple[int, ...] = (1, 2, 5) if len(decades) <= 3 else (1,)
            found = [step * 10.0**power for power in decades for step in steps]
            found = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
            return found[:: math.ceil(len(found) / 8)] if found else [self.low, self.high]
        raw = (self.high - self.low) / 5 or 1.0
        step = min((f * 10 ** math.floor(math.log10(raw)) for f in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
        first = math.ceil(self.low / step)
        return [step * i for i in range(first, first + 8) if step * i <= self.high * 1.001]


def _scale(values: Sequence[float], start: float, end: float, *, log: bool) -> Scale:
    low, high = min(values), max(values)
    if log:
        low, high = max(low, 1e-12), max(high, 1e-12)
        return Scale(low / 1.35, high * 1.35, start, end, True)
    pad = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return Scale(0.0 if low >= 0 else low - pad, high + pad, start, end, False)


def number(value: float) -> str:
    """A short text: 12k, 0.05, 1e-07."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, word in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{word}"
    return f"{value:.3g}"


def _frame(x: Scale, y: Scale, *, x_title: str, y_title: str, body: str, x_ticks: Sequence[float] = ()) -> str:
    parts = []
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks or x.ticks():
        at = x(tick)
        parts.append(f'<line class="grid" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" x1="{at:.1f}" x2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{number(tick)}</text>'
        )
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" '
        f'text-anchor="middle">{escape(x_title)}</text>'
    )
    parts.append(
        f'<text class="axis" transform="translate(14 {middle}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_title)}</text>'
    )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}{body}</svg>'


def scatter(dots: Sequence[Dot], *, x_title: str, y_title: str, log_y: bool = True) -> str:
    """Dots on a logarithmic x axis, the Pareto front drawn through those that no other beats in both."""
    if not dots:
        return ""
    x = _scale([dot.x for dot in dots], _LEFT, _WIDTH - _RIGHT, log=True)
    y = _scale([dot.y for dot in dots], _HEIGHT - _BOTTOM, _TOP, log=log_y)
    best = front([(dot.x, dot.y) for dot in dots if not dot.hollow])
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in best)
    body = f'<polyline class="front" points="{path}"/>' if len(best) > 1 else ""
    for dot in sorted(dots, key=lambda dot: dot.strong):
        kind = "dot hollow" if dot.hollow else "dot"
        ring = f'<circle class="ring" cx="{x(dot.x):.1f}" cy="{y(dot.y):.1f}" r="10"/>' if dot.strong else ""
        body += (
            f'{ring}<circle class="{kind}" style="--c:var(--c{dot.colour % COLOURS})" cx="{x(dot.x):.1f}" '
            f'cy="{y(dot.y):.1f}" r="5.5"><title>{escape(dot.label)}</title></circle>'
        )
    return _frame(x, y, x_title=x_title, y_title=y_title, body=body)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in both coordinates (smaller is better), by rising x."""
    found: list[tuple[float, float]] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def lines(series: Sequence[Series], *, x_title: str, y_title: str) -> str:
    """Series on logarithmic axes, each point with its value on hover."""
    points = [point for line in series for point in line.points]
    if not points:
        return ""
    x = _scale([a for a, _ in points], _LEFT, _WIDTH - _RIGHT, log=True)
    y = _scale([b for _, b in points], _HEIGHT - _BOTTOM, _TOP, log=True)
    body = ""
    for line in sorted(series, key=lambda line: line.strong):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        style = f'style="--c:var(--c{line.colour % COLOURS})"'
        body += f'<polyline class="{"line strong" if line.strong else "line"}" {style} points="{path}"/>'
        for a, b in line.points:
            word = escape(f"{line.label}: {number(b)} at {number(a)}")
            body += f'<circle class="dot" {style} cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"><title>{word}</title></circle>'
    return _frame(x, y, x_title=x_title, y_title=y_title, body=body, x_ticks=sorted({a for a, _ in points}))


def bars(values: Sequence[tuple[str, float, bool]], *, unit: str) -> str:
    """Horizontal bars: name, value, and whether to mark it."""
    if not values:
        return ""
    top = max(value for _, value, _ in values) or 1.0
    height = 20 * len(values) + 8
    body = ""
    for index, (name, value, marked) in enumerate(values):
        at, width = 20 * index + 4, max(2.0, 250 * max(value, 0.0) / top)
        kind = "bar marked" if marked else "bar"
        short = name if len(name) <= 34 else "…" + name[-33:]
        body += (
            f'<text class="tick" x="200" y="{at + 12}" text-anchor="end">{escape(short)}</text>'
            f'<rect class="{kind}" x="208" y="{at}" width="{width:.1f}" height="14" rx="2">'
            f"<title>{escape(name)}</title></rect>"
            f'<text class="tick" x="{214 + width:.1f}" y="{at + 12}">{number(value)} {escape(unit)}</text>'
        )
    return f'<svg class="bars" viewBox="0 0 {_WIDTH} {height}" role="img">{body}</svg>'
