"""Chooses the winner: a pure function of the trials, the goal and the constraints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import msgspec

from torchship.artifact.manifest import Timing
from torchship.errors import BadConfig
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe

Goal: TypeAlias = Literal["latency", "throughput", "size", "memory"]
GOALS: tuple[str, ...] = get_args(Goal)
_CLOSE = 1.02  # within 2 % two candidates count as equal, and the more exact one wins


class Constraints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds that a winner must keep: p99 at batch 1 in milliseconds, peak memory and file size in bytes."""

    max_latency_p99: float | None = None
    max_memory: int | None = None
    max_size: int | None = None

    def against(self, timing: Timing) -> str:
        """Which bound a timing breaks, in words; empty when it keeps all."""
        return "; ".join(words for _, words in self._broken(timing))

    def excess(self, timing: Timing) -> float:
        """How many times the most broken bound is exceeded; 0 when all are kept."""
        return max((factor for factor, _ in self._broken(timing)), default=0.0)

    def _broken(self, timing: Timing) -> list[tuple[float, str]]:
        def ms(value: float) -> str:
            return f"{value:.3g} ms"

        bounds: list[tuple[str, float, float | None, Callable[[float], str]]] = [
            ("p99", timing.curve[0].p99_ms, self.max_latency_p99, ms),
            ("peak memory", timing.peak_memory, self.max_memory, _bytes),
            ("size", timing.file_size, self.max_size, _bytes),
        ]
        return [
            (value / max(most, 1e-9), f"{what} {told(value)} is above {told(most)}")
            for what, value, most, told in bounds
            if most is not None and value > most
        ]


class Choice(msgspec.Struct, frozen=True):
    """The winner's place among the trials (None: nobody), all valid ones best first, why, and who broke a bound."""

    winner: int | None
    ranking: tuple[int, ...]
    reason: str
    outside: dict[int, str] = {}


def cost(timing: Timing, *, goal: Goal) -> float:
    """What the goal minimises: p50 at batch 1 in ms, seconds for a row at the best batch, or bytes."""
    costs: dict[Goal, Callable[[], float]] = {
        "latency": lambda: timing.curve[0].p50_ms,
        "throughput": lambda: 1.0 / max(point.rows_per_s for point in timing.curve),
        "size": lambda: float(timing.file_size),
        "memory": lambda: float(timing.peak_memory),
    }
    if goal not in costs:
        raise BadConfig(f"unknown goal {goal!r}", hint=f"use one of {', '.join(GOALS)}")
    return costs[goal]()


def choose(trials: Sequence[Trial], *, goal: Goal, constraints: Constraints | None = None) -> Choice:
    """The best trial that is ok, passed the guard and keeps the constraints.

    Candidates within 2 % of the best count as equal: of these what is proved wins, then the smallest output error.
    """
    constraints = constraints or Constraints()
    outside: dict[int, str] = {}
    valid: list[int] = []
    for index, trial in enumerate(trials):
        if not is_valid(trial) or trial.timing is None:
            continue
        fault = constraints.against(trial.timing)
        if fault:
            outside[index] = fault
        else:
            valid.append(index)
    costs = {index: cost(_timing(trials[index]), goal=goal) for index in valid}
    ranking = sorted(valid, key=lambda index: costs[index])
    if not ranking:
        return Choice(None, (), _nobody(trials, outside, constraints), outside)
    best = costs[ranking[0]]
    equal = [index for index in ranking if costs[index] <= best * _CLOSE]
    winner = min(equal, key=lambda index: (not is_proved(trials[index]), _error(trials[index]), costs[index]))
    ranking.remove(winner)
    ranking.insert(0, winner)
    why = _why(trials, ranking, costs, goal)
    better = sum(cost(_timing(trials[index]), goal=goal) < costs[winner] for index in outside)
    if better:
        why += f"; {better} that would be better break{'s' if better == 1 else ''} a limit"
    return Choice(winner, tuple(ranking), why, outside)


def is_valid(trial: Trial) -> bool:
    """Whether a trial ran, was measured and passed the guard."""
    measured = trial.status == "ok" and trial.timing is not None and bool(trial.timing.curve)
    return measured and trial.verdict is not None and trial.verdict.passed


def is_proved(trial: Trial) -> bool:
    """Whether the guard proved that a trial loses no more than it may."""
    evidence = trial.verdict.evidence if trial.verdict else None
    return evidence is not None and evidence.state == "proved"


def _timing(trial: Trial) -> Timing:
    assert trial.timing is not None  # noqa: S101  # valid trials are measured
    return trial.timing


def _error(trial: Trial) -> float:
    return trial.verdict.error if trial.verdict else float("inf")


def _nobody(trials: Sequence[Trial], outside: dict[int, str], constraints: Constraints) -> str:
    if outside:
        nearest = min(outside, key=lambda index: constraints.excess(_timing(trials[index])))
        many = f"{len(outside)} valid candidates break" if len(outside) > 1 else "the only valid candidate breaks"
        return f"{many} a limit; the nearest is {trials[nearest].recipe.label}: {outside[nearest]}"
    causes = [f"{trial.recipe.label}: {trial.failure}" for trial in trials if trial.failure]
    return "no candidate was valid" + (f"; {causes[0]}" if causes else "")


def _why(trials: Sequence[Trial], ranking: Sequence[int], costs: dict[int, float], goal: Goal) -> str:
    first = trials[ranking[0]]
    noun = {
        "latency": "fastest at batch 1",
        "throughput": "most rows a second",
        "size": "smallest",
        "memory": "least memory",
    }[goal]
    parts = [noun]
    eager = next((i for i in ranking if trials[i].recipe == Recipe("eager")), None)
    if eager is not None and eager != ranking[0]:
        parts.append(f"{costs[eager] / max(costs[ranking[0]], 1e-12):.2f}x better than eager")
    if len(ranking) > 1 and ranking[1] != eager:
        parts.append(
            f"{costs[ranking[1]] / max(costs[ranking[0]], 1e-12):.2f}x better than {trials[ranking[1]].recipe.label}"
        )
    if first.verdict:
        parts.append(first.verdict.reason or f"output error {first.verdict.error:.2g}")
    return ", ".join(parts)


def _bytes(size: float) -> str:
    for limit, unit in ((1e6, "MB"), (1e3, "kB")):
        if size >= limit:
            return f"{size / limit:.4g} {unit}"
    return f"{size:.0f} B"
