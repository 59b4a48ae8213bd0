"""The Report: what was tried, what won and why, as an object, a terminal table, JSON and a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from torchship.artifact import Artifact
from torchship.artifact import folder as folders
from torchship.artifact.manifest import BatchPoint
from torchship.optimize.choose import Choice, Constraints, Goal, is_valid
from torchship.optimize.trial import Trial

if TYPE_CHECKING:
    from rich.table import Table


class Facts(msgspec.Struct, frozen=True):
    """The content of `report.json`. `command` repeats the search; `left_out` tells why backends did not take part."""

    name: str
    created: str
    torchship: str
    source: str
    signature: str
    hardware: str
    fingerprint: str
    threads: int
    device: str
    goal: Goal
    constraints: Constraints
    trials: tuple[Trial, ...]
    choice: Choice
    left_out: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    command: str = ""
    rows: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    reference_metric: float | None = None
    packages: dict[str, str] = {}
    sensitivity: tuple[tuple[str, float], ...] = ()


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
        from torchship.optimize import page

        root = Path(folder)
        folders.write(root / "report.json", msgspec.json.format(msgspec.json.encode(self.facts), indent=1))
        folders.write(root / "report.html", page.render(self.facts).encode())
        return root / "report.html"

    def table(self) -> Table:
        """A rich table: one row a trial, best first, then what was refused or failed."""
        return table(self.facts)


def eager_of(facts: Facts) -> Trial | None:
    """The trial of the plain eager module, where it was measured."""
    return next((t for t in facts.trials if t.recipe.backend == "eager" and not t.recipe.transforms and t.timing), None)


def load(path: Path | str) -> Facts:
    """Read a `report.json`."""
    return msgspec.json.decode(Path(path).read_bytes(), type=Facts)


def ordered(facts: Facts) -> list[Trial]:
    """Ranked trials first, then valid ones outside the constraints, refused, failed, skipped."""
    ranked = [facts.trials[index] for index in facts.choice.ranking]
    order = {"ok": 0, "refused": 1, "failed": 2, "skipped": 3}
    rest = [t for i, t in enumerate(facts.trials) if i not in facts.choice.ranking]
    return ranked + sorted(rest, key=lambda trial: order[trial.status])


def at_batch(trial: Trial, batch: int) -> BatchPoint | None:
    """The measured point of one batch size."""
    points = trial.timing.curve if trial.timing else ()
    return next((point for point in points if point.batch == batch), None)


def best_rate(trial: Trial) -> float:
    """Rows a second at the best batch size."""
    return max((point.rows_per_s for point in trial.timing.curve), default=0.0) if trial.timing else 0.0


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
        won = facts.choice.winner is not None and facts.trials[facts.choice.winner] is trial
        found.add_row(*cells(trial, base=base, outside=_outside(facts, trial), won=won), style=_style(trial, won))
    return found


def _outside(facts: Facts, trial: Trial) -> str:
    return next((why for index, why in facts.choice.outside.items() if facts.trials[index] is trial), "")


def _style(trial: Trial, won: bool) -> str:
    if won:
        return "bold green"
    return {"ok": "", "refused": "yellow", "failed": "red", "skipped": "dim"}[trial.status]


def cells(trial: Trial, *, base: float, outside: str = "", won: bool = False) -> list[str]:
    """One trial as text, in the order of the table's columns."""
    words = [trial.recipe.label]
    for batch in (1, 8):
        point = at_batch(trial, batch)
        words += [_ms(point.p50_ms), _ms(point.p99_ms)] if point else ["-", "-"]
    timing, verdict = trial.timing, trial.verdict
    words += (
        [f"{best_rate(trial):,.0f}", f"{timing.file_size / 1e6:.1f}", f"{timing.peak_memory / 1e6:.0f}"]
        if timing
        else ["-"] * 3
    )
    words.append(f"{verdict.error:.2g}" if verdict else "-")
    words.append(agreement_text(trial))
    words.append(f"{base / timing.curve[0].p50_ms:.1f}" if timing and base else "-")
    words.append("winner" if won else trial.failure or outside or "")
    return words


def agreement_text(trial: Trial) -> str:
    """The user's metric, else top-1 agreement, else cosine similarity."""
    verdict = trial.verdict
    if verdict is None:
        return "-"
    if verdict.metric is not None:
        return f"{verdict.metric:.4g}"
    return f"{verdict.top1:.1%}" if verdict.top1 is not None else f"cos {verdict.cosine:.4f}"


def line(trial: Trial) -> str:
    """One finished trial in one line, as the progress shows it."""
    mark = {"ok": "ok", "refused": "refused", "failed": "failed", "skipped": "skipped"}[trial.status]
    if not is_valid(trial) or trial.timing is None:
        return f"{mark:8} {trial.recipe.label}: {trial.failure}"
    first = trial.timing.curve[0]
    how = "cached" if trial.cached else f"{trial.seconds:.0f} s"
    speed = f"{_ms(first.p50_ms)} ms, {best_rate(trial):,.0f} rows/s"
    return f"{mark:8} {trial.recipe.label}: {speed}, agreement {agreement_text(trial)} ({how})"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"
