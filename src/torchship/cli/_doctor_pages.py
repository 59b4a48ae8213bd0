"""What the doctor found, as pages for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from torchship.doctor.diagnose import Diagnosis
    from torchship.doctor.examination import Examination, RouteRow
    from torchship.doctor.explain import Explanation
    from torchship.doctor.machine import Machine

_COLOURS = {"ok": "green", "warn": "yellow", "bad": "red", "info": "dim"}


def _console() -> Console:
    from torchship.cli._shown import console

    return console()


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
        from rich.markup import escape

        console.print(f"\n[bold]{title}")
        for line in lines:
            _hang(console, "- ", escape(line), indent=2)


def show_examination(found: Examination) -> None:
    """Routes, refusals with edits, breaks, findings, costs."""
    console = _console()
    from rich.markup import escape

    console.print(f"[bold]{escape(found.target)}[/]  {escape(found.signature)}\n")
    table = _table("Routes out of Python", "route", "takes it", "opens the way to", "what was seen")
    for row in found.routes:
        state = "[green]yes" if row.ok else "[red]no"
        seen = row.summary or (f"outputs agree to {row.error:.1g}" if row.error is not None else "")
        if row.diagnosis is not None and seen == row.diagnosis.words:
            seen = row.diagnosis.construct  # its words follow below
        table.add_row(escape(row.route), state, escape(row.opens), escape(seen))
    console.print(table)
    told = _show_refusals(found.routes, console=console)
    _show_breaks(found, told, console=console)
    if found.findings:
        console.print("\n[bold]Findings")
        places: dict[tuple[str, str, str], list[str]] = {}
        for finding in found.findings:
            mend = f"; {finding.edit}" if finding.edit else ""
            same = places.setdefault((finding.level, finding.name, finding.words + mend), [])
            same += [f"{finding.place}: {finding.place.code}"] if finding.place else []
        for (level, name, words), where in places.items():
            listed = "".join(f"\nat {place}" for place in where)
            text = f"[bold]{escape(name)}[/]: {escape(words)}{escape(listed)}"
            _hang(console, f"[{_COLOURS[level]}]{level:4}[/] ", text, indent=2)
    _show_cost(found, console=console)
    verdict = "healthy" if found.healthy else "needs care: see above"
    console.print(f"\n[bold {'green' if found.healthy else 'yellow'}]{verdict}")


def _hang(console: Console, head: str, words: str, *, indent: int) -> None:
    """Markup after a head of its own; wrapped lines stay right of the head."""
    from rich.padding import Padding
    from rich.table import Table

    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(head, words)
    console.print(Padding(grid, (0, 0, 0, indent)))


def _show_refusals(rows: list[RouteRow], *, console: Console) -> set[tuple[str, str]]:
    """Equal diagnoses of several routes are told once; returns which construct at which place."""
    told: dict[tuple[str, str], list[RouteRow]] = {}
    for row in rows:
        if row.diagnosis is not None:
            told.setdefault(_what(row.diagnosis), []).append(row)
    if told:
        console.print("\n[bold]Why not, and what to change")
    for group in told.values():
        assert group[0].diagnosis is not None  # noqa: S101  # only rows with one were kept
        _show_diagnosis(", ".join(row.route for row in group), group[0].diagnosis, console=console)
    return set(told)


def _what(diagnosis: Diagnosis) -> tuple[str, str]:
    return diagnosis.construct, str(diagnosis.place)


def _show_breaks(found: Examination, told: set[tuple[str, str]], *, console: Console) -> None:
    breaks = {_what(diagnosis): diagnosis for diagnosis in reversed(found.breaks)}
    if breaks:
        console.print(f"\n[bold]Graph breaks[/] ({found.graphs} graph{'s' if found.graphs != 1 else ''})")
    for number, (what, diagnosis) in enumerate(reversed(breaks.items()), start=1):
        if what in told:
            console.print(f"  {number}: {what[0]} at {what[1]}, see above", markup=False)
        else:
            _show_diagnosis(f"{number}", diagnosis, console=console)


def _show_diagnosis(title: str, diagnosis: Diagnosis, *, console: Console) -> None:
    from rich.markup import escape

    console.print(f"  [bold]{escape(title)}[/]: [cyan]{escape(diagnosis.construct)}")
    _hang(console, "why  ", escape(diagnosis.words), indent=6)
    if diagnosis.place is not None:
        console.print(f"      at   {diagnosis.place}: {diagnosis.place.code}", markup=False, soft_wrap=True)
    if diagnosis.called is not None:
        console.print(f"      from {diagnosis.called}: {diagnosis.called.code}", markup=False, soft_wrap=True)
    _hang(console, "do   ", escape(diagnosis.edit), indent=6)
    for mark, colour, text in (("-", "red", diagnosis.old), ("+", "green", diagnosis.new)):
        for line in text.splitlines():
            console.print(f"           {mark} {line}", style=colour, markup=False, soft_wrap=True)
    if diagnosis.said:
        _hang(console, "said ", f"[dim]{escape(diagnosis.said)}[/]", indent=6)


def _show_cost(found: Examination, *, console: Console) -> None:
    for note in found.notes:
        console.print(f"\nnote: {note}", markup=False)
    cost = found.cost
    if cost is None:
        return
    from torchship.cli._shown import human_size

    kind = f" ({cost.convolution:.0f} % convolutions, {cost.product:.0f} % matrix products)" if cost.flops else ""
    console.print(
        f"\n[bold]Cost of one row[/]: {_many(cost.flops)}FLOP = {_many(cost.flops / 2)}MAC{kind}, "
        f"{_many(cost.parameters).strip()} parameters ({human_size(cost.weight_bytes)}), "
        f"{human_size(cost.activations)} of activations at once"
    )
    _show_list("What this machine has for it", cost.usable, console=console)


def _many(count: float) -> str:
    """4.1 G, 25.6 M, 72."""
    for limit, word in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {word}"
    return f"{count:.0f} "


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
            _hang(console, "- ", escape(line), indent=2)
