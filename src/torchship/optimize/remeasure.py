"""Remeasuring: candidates that lie close are measured again, interleaved, so that noise does not pick the winner."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from torchship.artifact import folder as folders
from torchship.artifact.manifest import BatchPoint, Timing
from torchship.optimize import interleaved
from torchship.optimize.attempt import SearchContext
from torchship.optimize.cache import digest
from torchship.optimize.choose import Choice, Goal, cost
from torchship.optimize.measure import point
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe

_CLOSE = 1.15
_MOST = 4
_FEWEST = 5


def close_ones(trials: Sequence[Trial], choice: Choice, *, goal: Goal) -> list[int]:
    """Places of the trials to measure again: those within 15 % of the best, four at most, and plain eager. Pure.

    Nobody when the goal is no speed or only one candidate is near.
    """
    if goal not in ("latency", "throughput") or not choice.ranking:
        return []
    prices = {place: _price(trials[place], goal) for place in choice.ranking}
    best = min(prices.values())
    close = [place for place in choice.ranking if prices[place] <= best * _CLOSE][:_MOST]
    if len(close) < 2:
        return []
    eager = next((place for place in choice.ranking if trials[place].recipe == Recipe("eager")), None)
    return close if eager is None or eager in close else [*close, eager]


def _price(trial: Trial, goal: Goal) -> float:
    assert trial.timing is not None  # noqa: S101  # only ranked trials come here
    return cost(trial.timing, goal=goal)


def run(trials: Sequence[Trial], choice: Choice, *, context: SearchContext) -> list[Trial]:
    """The trials with the close ones' timing measured again; unchanged where there is nothing to settle."""
    goal = context.config.goal
    places = close_ones(trials, choice, goal=goal)
    if not places or time.monotonic() > context.deadline:
        return list(trials)
    batches = {place: _batch(trials[place], goal) for place in places}
    key = digest([(trials[place].key, batches[place]) for place in places])
    known = context.cache.root / "rematches" / f"{key}.json"
    try:
        points = msgspec.json.decode(known.read_bytes(), type=dict[int, BatchPoint])
    except (FileNotFoundError, msgspec.MsgspecError):
        points = _measured(trials, batches, context)
        folders.write(known, msgspec.json.encode(points))
    return [
        _settled(trial, points[place], len(points)) if place in points else trial for place, trial in enumerate(trials)
    ]


def _batch(trial: Trial, goal: Goal) -> int:
    curve = trial.timing.curve if trial.timing else ()
    return curve[0].batch if goal == "latency" else max(curve, key=lambda found: found.rows_per_s).batch


def _settled(trial: Trial, found: BatchPoint, count: int) -> Trial:
    """The trial with one point of its curve replaced."""
    timing = trial.timing
    assert timing is not None  # noqa: S101  # only measured trials are measured again
    curve = tuple(found if old.batch == found.batch else old for old in timing.curve)
    changed: Timing = msgspec.structs.replace(timing, curve=curve)
    note = f"batch {found.batch} was measured again in turns with {count - 1} others"
    return msgspec.structs.replace(trial, timing=changed, notes=(*trial.notes, note))


def _measured(trials: Sequence[Trial], batches: dict[int, int], context: SearchContext) -> dict[int, BatchPoint]:
    contestants = [(Path(trials[place].artifact), batch) for place, batch in batches.items()]
    config = context.config
    found = interleaved.measure(contestants, device=config.device, threads=config.threads, deadline=context.deadline)
    return {
        place: point(seconds, batch=batch)
        for (place, batch), seconds in zip(batches.items(), found, strict=True)
        if len(seconds) >= _FEWEST
    }
