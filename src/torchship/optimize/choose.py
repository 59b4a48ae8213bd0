"""Chooses the winner: a pure function of the trials, the goal and the constraints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import msgspec

from torchship import plugins
from torchship.artifact.manifest import Timing
from torchship.errors import BadConfig
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe

Goal: TypeAlias = Literal["latency", "throughput", "size", "memory"]
GOALS: tuple[str, ...] = get_args(Goal)
_BEST: dict[Goal, str] = {
    "latency": "fastest at batch 1",
    "throughput": "most rows a second",
    "size": "smallest",
    "memory": "least memory",
}
_CLOSE = 1.02  # within 2 % two candidates count as equal, and the more exact one wins


class Constraints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds that a winner must keep: p99 at batch 1 in milliseconds, peak memory and file size in bytes."""

    max_latency_p99: float | None = None
    max_memory: int | None = None
    max_size: int | None = None

    def broken(self, trial: Trial) -> list[tuple[float, str]]:
        """How many times each bound that a measured trial breaks is exceeded, and the same in words."""
        timing = trial.timing
        if timing is None:
            return []
        bounds: list[tuple[str, float, float | None, Callable[[float], str]]] = [
            ("p99", timing.curve[0].p99_ms, self.max_latency_p99, "{:.3g} ms".format),
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


@functools.cache
def baseline(device: str = "cpu") -> Recipe:
    """What all else on a device is measured against: the backend that says so of itself, as it is."""
    names = plugins.names("backends")
    name = next(name for name in names if plugins.fact("backends", name, "BASELINE", False))
    return Recipe(name, {} if device == "cpu" else {"device": device})


def baseline_place(trials: Sequence[Trial], ranking: Sequence[int]) -> int | None:
    """The place of the valid trial that the first of `ranking` is told against: the module as it is on its device,
    saved or kept as Python, else on the processor; None where neither ran."""
    device = device_of(trials[ranking[0]].recipe) if ranking else "cpu"
    for wanted in (device, "cpu"):
        plain = [place for place in ranking if is_plain(trials[place].recipe, device=wanted)]
        if plain:
            return min(plain, key=lambda place: trials[place].recipe != baseline(wanted))
    return None


def device_of(recipe: Recipe) -> str:
    """The device that a recipe names, else the processor."""
    return str(recipe.options.get("device", "cpu"))


def is_plain(recipe: Recipe, *, device: str = "cpu") -> bool:
    """Whether this is the user's own module, unchanged, on `device`: the baseline, or what stands in for it."""
    own = plugins.fact("backends", recipe.backend, "PLAIN", None)
    unchanged = own is not None and not recipe.transforms and recipe.options.keys() <= {"device", *own}
    return unchanged and device_of(recipe) == device


def accelerated(recipe: Recipe) -> bool:
    """Whether a recipe asks for a device or an execution provider other than the processor."""
    wish = str(recipe.options.get("device") or recipe.options.get("provider") or "cpu").lower()
    return not wish.startswith("cpu")


def cost(trial: Trial, *, goal: Goal) -> float:
    """What the goal minimises, see `price`; infinite for a trial that was not measured."""
    if goal not in GOALS:
        raise BadConfig(f"unknown goal {goal!r}", hint=f"use one of {', '.join(GOALS)}")
    return float("inf") if trial.timing is None else price(trial.timing, goal=goal)


def price(timing: Timing, *, goal: Goal) -> float:
    """p50 at batch 1 in ms, seconds for a row at the best batch, or bytes; infinite where nothing was measured."""
    if not timing.curve:
        return float("inf")
    if goal == "latency":
        return timing.curve[0].p50_ms
    if goal == "throughput":
        return 1.0 / max(point.rows_per_s for point in timing.curve)
    return float(timing.file_size if goal == "size" else timing.peak_memory)


def choose(trials: Sequence[Trial], *, goal: Goal, constraints: Constraints | None = None) -> Choice:
    """The best trial that is ok, passed the guard and keeps the constraints.

    Candidates within 2 % of the best count as equal: of these what is proved wins, then the smallest output error.
    """
    limits = constraints or Constraints()
    valid = [index for index, trial in enumerate(trials) if is_valid(trial)]
    broken = {index: found for index in valid if (found := limits.broken(trials[index]))}
    outside = {index: "; ".join(words for _, words in found) for index, found in broken.items()}
    costs = {index: cost(trials[index], goal=goal) for index in valid}
    ranking = sorted((index for index in valid if index not in outside), key=lambda index: costs[index])
    if not ranking and outside:
        nearest = min(outside, key=lambda index: max(broken[index]))
        many = f"{len(outside)} valid candidates break" if len(outside) > 1 else "the only valid candidate breaks"
        why = f"{many} a limit; the nearest is {trials[nearest].recipe.label}: {outside[nearest]}"
        return Choice(None, (), why, outside)
    if not ranking:
        cause = next((f"; {trial.recipe.label}: {trial.failure}" for trial in trials if trial.failure), "")
        return Choice(None, (), f"no candidate was valid{cause}", outside)
    equal = [index for index in ranking if costs[index] <= costs[ranking[0]] * _CLOSE]

    def exactness(index: int) -> tuple[bool, float, float]:
        verdict = trials[index].verdict
        assert verdict is not None  # noqa: S101  # valid trials were judged
        proved = verdict.evidence is not None and verdict.evidence.state == "proved"
        return not proved, verdict.error, costs[index]

    winner = min(equal, key=exactness)
    ranking.remove(winner)
    ranking.insert(0, winner)
    why = _why(trials, ranking, costs, goal)
    better = sum(costs[index] < costs[winner] for index in outside)
    if better:
        why += f"; {better} that would be better break{'s' if better == 1 else ''} a limit"
    return Choice(winner, tuple(ranking), why, outside)


def is_valid(trial: Trial) -> bool:
    """Whether a trial ran, was measured and passed the guard."""
    measured = trial.status == "ok" and trial.timing is not None and bool(trial.timing.curve)
    return measured and trial.verdict is not None and trial.verdict.passed


def _why(trials: Sequence[Trial], ranking: Sequence[int], costs: dict[int, float], goal: Goal) -> str:
    plain = baseline_place(trials, ranking)
    second = ranking[1] if len(ranking) > 1 else None
    parts = [_BEST[goal]]
    for index in dict.fromkeys((plain, second)):
        if index is not None and index != ranking[0]:
            times = costs[index] / max(costs[ranking[0]], 1e-12)
            parts.append(f"{times:.2f}x better than {trials[index].recipe.label}")
    if verdict := trials[ranking[0]].verdict:
        parts.append(verdict.reason or f"output error {verdict.error:.2g}")
    return ", ".join(parts)


def _bytes(size: float) -> str:
    for limit, unit in ((1e6, "MB"), (1e3, "kB")):
        if size >= limit:
            return f"{size / limit:.4g} {unit}"
    return f"{size:.0f} B"
