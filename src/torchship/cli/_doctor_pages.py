"""What the doctor found, as pages for a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from torchship.optimize.doctor.diagnose import Diagnosis
    from torchship.optimize.doctor.examination import Examination, RouteRow
    from torchship.optimize.doctor.explain import Explanation
    from torchship.optimize.doctor.machine import Machine

_COLOURS = {"ok": "green", "warn": "yellow", "bad": "red", "info": "dim"}


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def show_machine(found: Machine) -> None:
    """The machine, its features, its backends."""
    console = _console()
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="This machine", title_justify="left", box=None, show_header=False, pad_edge=False)
    for fact in found.facts:
        colour = _COLOURS[fact.level]
        table.add_row(f"[bold]{escape(fact.name)}", f"[{colour}]{escape(fact.value)}")
    packages = ", ".join(f"{name} {number}" for name, number in found.packages.items())
    table.add_row("[bold]packages", escape(packages) or "-")
    table.add_row("[bold]fingerprint", found.fingerprint)
    console.print(table, "")
    table = _table("Features", "feature", "here", "good for")
    for feature in found.features:
        name = feature.name if feature.device == "cpu" else f"{feature.name} ({feature.device})"
        table.add_row(escape(name), "[green]yes" if feature.present else "[dim]no", escape(feature.use))
    console.print(table, "")
    table = _table("Backends", "backend", "runs here", "why not")
    for row in found.backends:
        table.add_row(escape(row.name), "[yellow]no" if row.reason else "[green]yes", escape(row.reason))
    console.print(table)
    _show_list("Advice", found.advice, console=console)


def _table(title: str, *headings: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _show_list(title: str, lines: list[str], *, console: Console) -> None:
    if lines:
        console.print(f"\n[bold]{title}")
        for line in lines:
            console.print(f"  - {line}", markup=False)


def show_examination(found: Examination) -> None:
    """Routes, refusals with edits, breaks, findings, costs."""
    console = _console()
    from rich.markup import escape

    console.print(f"[bold]{escape(found.target)}[/]  {escape(found.signature)}\n")
    table = _table("Routes out of Python", "route", "takes it", "opens the way to", "what was seen")
    for row in found.routes:
        state = "[green]yes" if row.ok else "[red]no"
        seen = row.summary or (f"outputs agree to {row.error:.1g}" if row.error is not None else "")
        table.add_row(escape(row.route), state, escape(row.opens), escape(seen))
    console.print(table)
    _show_refusals(found.routes, console=console)
    if found.breaks:
        console.print(f"\n[bold]Graph breaks[/] ({found.graphs} graphs)")
        for number, diagnosis in enumerate(dict.fromkeys(found.breaks), start=1):
            _show_diagnosis(f"break {number}", diagnosis, console=console)
    if found.findings:
        console.print("\n[bold]Findings")
        for finding in found.findings:
            colour = _COLOURS[finding.level]
            where = f" [{finding.place}] {finding.place.code}" if finding.place else ""
            mend = f"; {finding.edit}" if finding.edit else ""
            console.print(
                f"  [{colour}]{finding.level:4}[/] {escape(finding.name)}: {escape(finding.words + mend + where)}"
            )
    _show_cost(found, console=console)
    verdict = "healthy" if found.healthy else "needs care: see above"
    console.print(f"\n[bold {'green' if found.healthy else 'yellow'}]{verdict}")


def _show_refusals(rows: list[RouteRow], *, console: Console) -> None:
    """Equal diagnoses of several routes are told once."""
    told: dict[tuple[Any, ...], list[RouteRow]] = {}
    for row in rows:
        if row.diagnosis is not None:
            key = (row.diagnosis.construct, str(row.diagnosis.place))
            told.setdefault(key, []).append(row)
    if told:
        console.print("\n[bold]Why not, and what to change")
    for group in told.values():
        diagnosis = group[0].diagnosis
        assert diagnosis is not None  # noqa: S101  # only rows with one were kept
        _show_diagnosis(", ".join(row.route for row in group), diagnosis, console=console)


def _show_diagnosis(title: str, diagnosis: Diagnosis, *, console: Console) -> None:
    from rich.markup import escape

    console.print(f"  [bold]{escape(title)}[/]: [cyan]{escape(diagnosis.construct)}[/]: {escape(diagnosis.words)}")
    if diagnosis.place is not None:
        console.print(f"      at {diagnosis.place}: {diagnosis.place.code}", markup=False, soft_wrap=True)
    console.print(f"      do {diagnosis.edit}", markup=False)
    for mark, colour, text in (("-", "red", diagnosis.old), ("+", "green", diagnosis.new)):
        for line in text.splitlines():
            console.print(f"        {mark} {line}", style=colour, markup=False)
    if diagnosis.said:
        console.print(f"      said: {diagnosis.said}", style="dim", markup=False)


def _show_cost(found: Examination, *, console: Console) -> None:
    for note in found.notes:
        console.print(f"\nnote: {note}", markup=False)
    cost = found.cost
    if cost is None:
        return
    console.print(
        f"\n[bold]Cost of one row[/]: {cost.flops / 1e9:.3f} GFLOP ({cost.convolution:.0f} % convolutions, "
        f"{cost.product:.0f} % matrix products), {cost.parameters / 1e6:.2f} M parameters "
        f"({cost.weight_bytes / 2**20:.1f} MiB), {cost.activations / 2**20:.2f} MiB of activations at once"
    )
    _show_list("What this machine has for it", cost.usable, console=console)


def show_explanations(found: list[Explanation]) -> None:
    """Failures of a log, what they mean and what to do."""
    console = _console()
    from rich.markup import escape

    if not found:
        console.print("nothing in there is a failure that torchship knows")
    for explanation in found:
        console.print(f"[bold red]{escape(explanation.name)}[/]: {escape(explanation.words)}")
        console.print(f"  seen: {explanation.line}", style="dim", markup=False, soft_wrap=True)
        for line in explanation.mend:
            console.print(f"  - {line}", markup=False)
