"""The facts of a search, as `report.json` keeps them, and how one trial is told in words."""

from __future__ import annotations

from pathlib import Path

import msgspec

from torchship.artifact.manifest import BatchPoint
from torchship.optimize.channels import PrunedRound
from torchship.optimize.choose import Choice, Constraints, Goal, accelerated, baseline, baseline_place, is_plain
from torchship.optimize.judge import HOPELESS
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe


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
    cards: tuple[str, ...] = ()
    pruned: tuple[PrunedRound, ...] = ()

    @property
    def winner(self) -> Trial | None:
        """The chosen trial."""
        return None if self.choice.winner is None else self.trials[self.choice.winner]

    @property
    def eager(self) -> Trial | None:
        """The trial of the plain eager module, where it was measured: on the winner's device where that was valid, or
        kept as Python where it cannot be saved."""
        if (place := baseline_place(self.trials, self.choice.ranking)) is not None:
            return self.trials[place]
        plain = [trial for trial in self.trials if trial.timing and is_plain(trial.recipe)]
        return min(plain, key=lambda trial: trial.recipe != baseline(), default=None)

    @property
    def idle(self) -> str:
        """What to know first where there is a card and the winner does not use it; empty elsewhere."""
        if not self.cards or self.device != "cpu" or self.winner is None or accelerated(self.winner.recipe):
            return ""
        tried = [trial for trial in self.trials if accelerated(trial.recipe)]
        fault = next((f": {trial.recipe.label}: {trial.failure}" for trial in tried if trial.failure), "")
        worse = any(trial.status == "ok" for trial in tried)
        why = "what runs on it is no better" if worse else f"nothing valid ran on it{fault}"
        return f"the {self.cards[0]} is not used: {why}"

    def ordered(self) -> list[Trial]:
        """Ranked trials first, then valid ones outside the constraints, refused, failed, skipped."""
        order = {"ok": 0, "refused": 1, "failed": 2, "skipped": 3}
        rest = [trial for index, trial in enumerate(self.trials) if index not in self.choice.ranking]
        ranked = [self.trials[index] for index in self.choice.ranking]
        return ranked + sorted(rest, key=lambda trial: order[trial.status])

    def outside(self, trial: Trial) -> str:
        """Which constraint a valid trial breaks, in words; empty when none."""
        return next((why for index, why in self.choice.outside.items() if self.trials[index] is trial), "")

    def cells(self, trial: Trial) -> list[str]:
        """One trial in numbers, in the order of the tables' columns."""
        timing, verdict, eager = trial.timing, trial.verdict, self.eager
        found = []
        for batch in (1, 8):
            point = at_batch(trial, batch)
            found += [ms_text(point.p50_ms), ms_text(point.p99_ms)] if point else ["-", "-"]
        if timing:
            found += [f"{best_rate(trial):,.0f}", megabytes(timing.file_size), f"{timing.peak_memory / 1e6:.0f}"]
        else:
            found += ["-"] * 3
        found.append(f"{verdict.error:.2g}" if verdict and verdict.error < HOPELESS else "-")
        times = eager.timing.curve[0].p50_ms / timing.curve[0].p50_ms if timing and eager and eager.timing else 0.0
        return [*found, agreement_text(trial), f"{times:.1f}" if times else "-"]


def load(path: Path | str) -> Facts:
    """Read a `report.json`."""
    return msgspec.json.decode(Path(path).read_bytes(), type=Facts)


def at_batch(trial: Trial, batch: int) -> BatchPoint | None:
    """The measured point of one batch size."""
    points = trial.timing.curve if trial.timing else ()
    return next((point for point in points if point.batch == batch), None)


def best_rate(trial: Trial) -> float:
    """Rows a second at the best batch size."""
    return max((point.rows_per_s for point in trial.timing.curve), default=0.0) if trial.timing else 0.0


def left_in_float(recipe: Recipe) -> list[str]:
    """The layers that a recipe leaves out of int8: told to the backend, or to torch's own quantizer."""
    places = (recipe.options, *(step.options for step in recipe.transforms))
    return [path for options in places if isinstance(listed := options.get("exclude"), list) for path in listed]


def agreement_text(trial: Trial) -> str:
    """The user's metric, else top-1 agreement, else cosine similarity."""
    verdict = trial.verdict
    if verdict is None:
        return "-"
    if verdict.metric is not None:
        return f"{verdict.metric:.4g}"
    return f"{verdict.top1:.1%}" if verdict.top1 is not None else f"cos {verdict.cosine:.4f}"


def megabytes(size: int) -> str:
    """Bytes as megabytes for readers: three digits, however small."""
    return f"{size / 1e6:.3g}" if size < 1e6 else f"{size / 1e6:,.1f}"


def ms_text(value: float) -> str:
    """Milliseconds for readers."""
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"
