"""Runs of the load generator as a page with a plot: throughput against latency, nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torchship.plugins import rendered

_WIDTH, _HEIGHT, _EDGE = 760, 420, 60
_LINES = (("p50_ms", "#2a7"), ("p90_ms", "#27c"), ("p99_ms", "#c33"), ("p99.9_ms", "#999"))
_COLUMNS = ("load", "rate", "p50_ms", "p90_ms", "p99_ms", "p99.9_ms", "faults")


def render(rows: Sequence[dict[str, Any]], *, title: str) -> str:
    """A page with the plot and the table of `CallOutcome.plain()` rows."""
    good = [row for row in rows if row["answers"] and row["rate"] > 0]
    plot = _plot(good) if good else {}
    places = {"width": _WIDTH, "height": _HEIGHT, "edge": _EDGE, "columns": _COLUMNS}
    return str(rendered("torchship.client", "load.html.j2", title=title, rows=rows, **places, **plot))


def _plot(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ticks of both axes and the curves as points: the rate is linear, the latency logarithmic."""
    times = [math.log10(float(row[name])) for row in rows for name, _ in _LINES]
    right, low, high = max(float(row["rate"]) for row in rows) * 1.05, min(times) - 0.1, max(times) + 0.1

    def x(rate: float) -> float:
        return round(_EDGE + rate / right * (_WIDTH - 2 * _EDGE), 1)

    def y(power: float) -> float:
        return round(_HEIGHT - _EDGE - (power - low) / (high - low) * (_HEIGHT - 2 * _EDGE), 1)

    curves = []
    for name, colour in _LINES:
        for kind, dash in (("closed", ""), ("open", "4 3")):
            points = sorted((x(row["rate"]), y(math.log10(row[name]))) for row in rows if row["kind"] == kind)
            curves.append((name.removesuffix("_ms") if kind == "closed" else "", colour, dash, points))
    y_ticks = [(y(power), f"{10.0**power:g}") for power in range(math.ceil(low), math.floor(high) + 1)]
    step = 10.0 ** math.floor(math.log10(right / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if right / (step * factor) < 10)  # four to nine round numbers
    x_ticks = [(x(step * place), f"{step * place:,.0f}") for place in range(int(right / step) + 1)]
    return {"curves": curves, "y_ticks": y_ticks, "x_ticks": x_ticks}
