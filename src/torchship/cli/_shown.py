"""How the command line shows sizes, tables and JSON."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that neither colours numbers nor wraps them away when it is piped: COLUMNS, or 140."""
    from rich.console import Console

    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"  # rich alone would keep bold
    found = Console(highlight=False, soft_wrap=False, stderr=stderr, quiet=quiet, color_system=colours)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = 140
    return found


def print_json(facts: object) -> None:
    """Facts as indented JSON on stdout."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(facts), indent=2).decode())


def human_size(count: float) -> str:
    """Bytes for readers: 512 B, 1.4 MB (decimal, as file systems count)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", right: Sequence[str] = ()
) -> Any:
    """A plain table; columns whose names are in `right` are aligned to the right.

    Cells are shown as they are: what is no `rich.text.Text` is no markup either.
    """
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    found = Table(box=None, pad_edge=False, show_header=any(columns))
    for column in columns:
        found.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        found.add_row(*(cell if isinstance(cell, Text) else escape(str(cell)) for cell in row))
    return Group(f"[bold]{escape(title)}[/bold]", found) if title else found  # a table's own title wraps at its width
