"""`torchship doctor`: what this machine can run, why a model does not export, and what a failure means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from torchship.optimize.doctor.machine import Machine


@click.command(
    epilog="""\b
Examples:
  torchship doctor
  torchship doctor --json | jq .backends
"""
)
@click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON to stdout.")
def command(*, as_json: bool) -> None:
    """Say what this machine is, which backends run here, and why the others do not.

    Always ends with exit code 0: a missing backend is a finding, not a failure.
    """
    from torchship.optimize.doctor.machine import examine

    found = examine()
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
        return
    from rich.console import Console

    _show_machine(found, console=Console(highlight=False))


_COLOURS = {"ok": "green", "warn": "yellow", "bad": "red"}


def _show_machine(found: Machine, *, console: Console) -> None:
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
    table = Table(title="Features", title_justify="left", box=None, pad_edge=False)
    for heading in ("feature", "here", "good for"):
        table.add_column(heading, overflow="fold")
    for feature in found.features:
        here = "[green]yes" if feature.present else "[dim]no"
        name = feature.name if feature.device == "cpu" else f"{feature.name} ({feature.device})"
        table.add_row(escape(name), here, escape(feature.use))
    console.print(table, "")
    table = Table(title="Backends", title_justify="left", box=None, pad_edge=False)
    for heading in ("backend", "runs here", "why not"):
        table.add_column(heading, overflow="fold")
    for row in found.backends:
        table.add_row(escape(row.name), "[yellow]no" if row.reason else "[green]yes", escape(row.reason))
    console.print(table)
    if found.advice:
        console.print("\n[bold]Advice")
        for line in found.advice:
            console.print(f"  - {escape(line)}")
