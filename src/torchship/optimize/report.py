"""The Report: what was tried, what won and why, as an object, a terminal table, JSON and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from torchship.artifact import Artifact
from torchship.artifact import folder as folders
from torchship.optimize import page
from torchship.optimize.choose import is_valid
from torchship.optimize.facts import Facts, agreement_text, best_rate, ms_text
from torchship.optimize.trial import Trial

if TYPE_CHECKING:
    import rich.table
    from rich.console import Console, ConsoleOptions, RenderResult

_HEADS = ("b1 p50", "p99", "b8 p50", "p99", "rows/s", "MB", "mem MB", "error", "agree", "x")
_NARROW = (0, 4, 5, 7, 8, 9)  # what a small terminal has room for, beside what the caller asked about
_WIDE = 112  # columns of a terminal that holds all of them beside the recipes
_STYLES = {"winner": "bold green", "ok": "", "refused": "yellow", "failed": "red"}


@dataclass(frozen=True)
class Report:
    """The outcome of one search. `artifact` is the published winner (None when nobody was valid)."""

    facts: Facts
    artifact: Artifact | None = None
    version: int = 0

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every recipe that was tried, failures too, in the order of the race."""
        return self.facts.trials

    @property
    def winner(self) -> Trial | None:
        """The chosen trial."""
        return self.facts.winner

    @property
    def speedup(self) -> float:
        """How many times faster than eager the winner answers at batch 1; 1 when either is missing."""
        eager, winner = self.facts.eager, self.facts.winner
        if eager is None or winner is None or not winner.timing or not eager.timing:
            return 1.0
        return eager.timing.curve[0].p50_ms / winner.timing.curve[0].p50_ms

    def save(self, folder: Path | str) -> Path:
        """Write `report.json` and `report.html` into a folder; returns the page's path."""
        root = Path(folder)
        folders.write(root / "report.json", msgspec.json.format(msgspec.json.encode(self.facts), indent=1))
        folders.write(root / "report.html", page.render(self.facts).encode())
        return root / "report.html"

    def table(self) -> Table:
        """For a rich console of any width: the measured trials, best first, then what the others came to, and why."""
        return Table(self.facts)


@dataclass(frozen=True)
class Table:
    """One row for each measured trial, times in ms; below it the refused, failed and skipped, by their reasons."""

    facts: Facts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        idle = f"; {self.facts.idle}" if self.facts.idle else ""
        yield Text(f"{self.facts.name}: goal {self.facts.goal}{idle}", style="italic")
        columns = {*range(len(_HEADS))} if options.max_width >= _WIDE else {*_NARROW}
        if self.facts.constraints.max_latency_p99 is not None:
            columns.add(_HEADS.index("p99"))
        if self.facts.constraints.max_memory is not None or self.facts.goal == "memory":
            columns.add(_HEADS.index("mem MB"))
        yield self._measured(sorted(columns))
        yield self._others()

    def _measured(self, columns: Sequence[int]) -> rich.table.Table:
        from rich.table import Table

        found = Table(pad_edge=False, box=None)
        found.add_column("recipe", overflow="fold")
        for column in columns:
            found.add_column(_HEADS[column], justify="right", no_wrap=True)
        found.add_column("", no_wrap=True)
        for trial in self.facts.ordered():
            if trial.timing:
                numbers = self.facts.cells(trial)
                word = "winner" if trial is self.facts.winner else trial.status.replace("ok", "")
                word = "over a limit" if self.facts.outside(trial) else word
                style = _STYLES.get(word or "ok", "dim")
                found.add_row(trial.recipe.label, *(numbers[column] for column in columns), word, style=style)
        return found

    def _others(self) -> rich.table.Table:
        from rich.table import Table
        from rich.text import Text

        told: dict[tuple[str, str], list[str]] = {}
        for trial in self.facts.ordered():
            outside = self.facts.outside(trial)
            if outside or trial.failure:
                key = ("over", outside) if outside else (trial.status, trial.failure)
                told.setdefault(key, []).append(trial.recipe.label)
        found = Table.grid(padding=(0, 2))
        for (kind, reason), labels in told.items():
            style = _STYLES.get(kind, "dim")
            words = f"{labels[0]}: {reason}" if len(labels) == 1 else f"{reason}: {', '.join(labels)}"
            found.add_row(Text(kind, style), Text(words, style, overflow="fold"))
        return found


def line(trial: Trial) -> str:
    """One finished trial in one line, as the progress shows it."""
    if not is_valid(trial) or trial.timing is None:
        return f"{trial.status:8} {trial.recipe.label}: {trial.failure}"
    first = trial.timing.curve[0]
    how = "cached" if trial.cached else f"{trial.seconds:.0f} s"
    speed = f"{ms_text(first.p50_ms)} ms, {best_rate(trial):,.0f} rows/s"
    return f"{trial.status:8} {trial.recipe.label}: {speed}, agreement {agreement_text(trial)} ({how})"
