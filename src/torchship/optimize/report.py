"""The Report: what was tried, what won and why, as an object, a terminal table, JSON and a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from torchship.artifact import Artifact
from torchship.artifact import folder as folders
from torchship.optimize import page
from torchship.optimize.choose import is_valid
from torchship.optimize.facts import (
    Facts,
    agreement_text,
    best_rate,
    cells,
    eager_of,
    has_won,
    ms_text,
    ordered,
    outside_of,
)
from torchship.optimize.trial import Trial

if TYPE_CHECKING:
    from rich.table import Table


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
        index = self.facts.choice.winner
        return None if index is None else self.facts.trials[index]

    @property
    def speedup(self) -> float:
        """How many times faster than eager the winner answers at batch 1; 1 when either is missing."""
        eager = eager_of(self.facts)
        if eager is None or self.winner is None or not self.winner.timing or not eager.timing:
            return 1.0
        return eager.timing.curve[0].p50_ms / self.winner.timing.curve[0].p50_ms

    def save(self, folder: Path | str) -> Path:
        """Write `report.json` and `report.html` into a folder; returns the page's path."""
        root = Path(folder)
        folders.write(root / "report.json", msgspec.json.format(msgspec.json.encode(self.facts), indent=1))
        folders.write(root / "report.html", page.render(self.facts).encode())
        return root / "report.html"

    def table(self) -> Table:
        """A rich table: one row a trial, best first, then what was refused or failed."""
        return table(self.facts)


def table(facts: Facts) -> Table:
    """One row a trial; times in ms."""
    from rich.table import Table

    found = Table(title=f"{facts.name}: goal {facts.goal}", title_justify="left", pad_edge=False, box=None)
    found.add_column("recipe", overflow="fold")
    for head in ("b1 p50", "p99", "b8 p50", "p99", "rows/s", "MB", "mem MB", "error", "agree", "x"):
        found.add_column(head, justify="right", no_wrap=True)
    found.add_column("", overflow="fold")
    eager = eager_of(facts)
    base = eager.timing.curve[0].p50_ms if eager and eager.timing else 0.0
    for trial in ordered(facts):
        won = has_won(facts, trial)
        found.add_row(*cells(trial, base=base, outside=outside_of(facts, trial), won=won), style=_style(trial, won))
    return found


def _style(trial: Trial, won: bool) -> str:
    if won:
        return "bold green"
    return {"ok": "", "refused": "yellow", "failed": "red", "skipped": "dim"}[trial.status]


def line(trial: Trial) -> str:
    """One finished trial in one line, as the progress shows it."""
    mark = {"ok": "ok", "refused": "refused", "failed": "failed", "skipped": "skipped"}[trial.status]
    if not is_valid(trial) or trial.timing is None:
        return f"{mark:8} {trial.recipe.label}: {trial.failure}"
    first = trial.timing.curve[0]
    how = "cached" if trial.cached else f"{trial.seconds:.0f} s"
    speed = f"{ms_text(first.p50_ms)} ms, {best_rate(trial):,.0f} rows/s"
    return f"{mark:8} {trial.recipe.label}: {speed}, agreement {agreement_text(trial)} ({how})"
