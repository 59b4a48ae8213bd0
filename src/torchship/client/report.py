"""Runs of the load generator as a page with a plot: throughput against latency, nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _EDGE = 760, 420, 60
_LINES = (("p50_ms", "#2a7"), ("p90_ms", "#27c"), ("p99_ms", "#c33"), ("p99.9_ms", "#999"))
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right}th{border-bottom:1px solid #ccc}"
    "svg{max-width:100%;height:auto}text{font-size:12px;fill:#555}"
)


def render(rows: Sequence[dict[str, Any]], *, title: str) -> str:
    """A page with the plot and the table of `Row.plain()` rows."""
    columns = ("load", "rate", "p50_ms", "p90_ms", "p99_ms", "p99.9_ms", "faults")
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = "".join("<tr>" + "".join(f"<td>{_cell(row[name])}</td>" for name in columns) + "</tr>" for row in rows)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(title)}</h1>{_plot(rows)}<table><tr>{head}</tr>{lines}</table></html>"
    )


def _ticks(top: float) -> list[float]:
    """Four to nine round numbers from 0 to at most `top`."""
    step = 10.0 ** math.floor(math.log10(top / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if top / (step * factor) < 10)
    return [step * place for place in range(int(top / step) + 1)]


def _cell(value: Any) -> str:
    return escape(f"{value:,.2f}" if isinstance(value, float) else str(value))


def _plot(rows: Sequence[dict[str, Any]]) -> str:
    good = [row for row in rows if row["answers"] and row["rate"] > 0]
    if not good:
        return "<p>No run had an answer.</p>"
    rates = [float(row["rate"]) for row in good]
    times = [float(row[name]) for row in good for name, _ in _LINES]
    left, right = 0.0, max(rates) * 1.05
    low, high = math.log10(min(times)) - 0.1, math.log10(max(times)) + 0.1

    def x(rate: float) -> float:
        return _EDGE + (rate - left) / (right - left) * (_WIDTH - 2 * _EDGE)

    def y(milliseconds: float) -> float:
        return _HEIGHT - _EDGE - (math.log10(milliseconds) - low) / (high - low) * (_HEIGHT - 2 * _EDGE)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="latency against throughput">']
    for power in range(math.ceil(low), math.floor(high) + 1):
        height = y(10.0**power)
        parts.append(f'<line x1="{_EDGE}" x2="{_WIDTH - _EDGE}" y1="{height:.1f}" y2="{height:.1f}" stroke="#eee"/>')
        parts.append(f'<text x="{_EDGE - 6}" y="{height + 4:.1f}" text-anchor="end">{10.0**power:g} ms</text>')
    for rate in _ticks(right):
        parts.append(f'<text x="{x(rate):.1f}" y="{_HEIGHT - _EDGE + 18}" text-anchor="middle">{rate:,.0f}/s</text>')
    for place, (name, colour) in enumerate(_LINES):
        for kind, dash in (("closed", ""), ("open", "4 3")):
            points = sorted((row["rate"], row[name]) for row in good if row["kind"] == kind)
            path = " ".join(f"{x(rate):.1f},{y(time):.1f}" for rate, time in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-dasharray="{dash}"/>')
            parts += [f'<circle cx="{x(r):.1f}" cy="{y(t):.1f}" r="3" fill="{colour}"/>' for r, t in points]
        parts.append(f'<text x="{_EDGE + 110 * place}" y="30" style="fill:{colour}">{name.removesuffix("_ms")}</text>')
    parts.append(
        f'<text x="{_WIDTH - _EDGE}" y="30" text-anchor="end">solid: closed loop, dashed: open loop</text></svg>'
    )
    return "".join(parts)
