"""Remeasuring: candidates that lie close are measured again, interleaved, so that noise does not pick the winner."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from torchship.artifact.manifest import BatchPoint
from torchship.optimize.attempt import SearchContext
from torchship.optimize.cache import digest
from torchship.optimize.choose import Choice, Goal, baseline_place, cost
from torchship.optimize.measure import interleaved, point
from torchship.optimize.trial import Trial

_CLOSE = 1.15
_MOST = 4
_FEWEST = 5


def close_ones(trials: Sequence[Trial], choice: Choice, *, goal: Goal) -> list[int]:
    """Places of the trials to measure again: those within 15 % of the best, four at most, and plain eager on the device
    of the best. Pure.

    Nobody when the goal is no speed or only one candidate is near.
    """
    if goal not in ("latency", "throughput") or not choice.ranking:
        return []
    costs = {place: cost(trials[place], goal=goal) for place in choice.ranking}
    close = [place for place in choice.ranking if costs[place] <= min(costs.values()) * _CLOSE][:_MOST]
    if len(close) < 2:
        return []
    eager = baseline_place(trials, choice.ranking)
    return close if eager is None or eager in close else [*close, eager]


def run(trials: Sequence[Trial], choice: Choice, *, context: SearchContext) -> list[Trial]:
    """The trials with one point of the close ones' curve measured again; unchanged where there is nothing to settle."""
    config = context.config
    places = close_ones(trials, choice, goal=config.goal)
    if not places or time.monotonic() > context.deadline:
        return list(trials)
    batches = {place: _batch(trials[place], config.goal) for place in places}
    key = digest([(trials[place].key, batches[place]) for place in places])
    points = context.cache.kept("remeasured", key, dict[int, BatchPoint])
    if points is None:
        contestants = [(Path(trials[place].artifact), batch) for place, batch in batches.items()]
        seconds = interleaved(contestants, device=config.device, threads=config.threads, deadline=context.deadline)
        samples = zip(batches.items(), seconds, strict=True)
        points = {place: point(taken, batch=batch) for (place, batch), taken in samples if len(taken) >= _FEWEST}
        context.cache.keep("remeasured", key, points)
    changed = list(trials)
    for place, found in points.items():
        trial, timing = changed[place], changed[place].timing
        assert timing is not None  # noqa: S101  # only measured trials are measured again
        curve = tuple(found if old.batch == found.batch else old for old in timing.curve)
        note = f"batch {found.batch} was measured again in turns with {len(points) - 1} others"
        timing = msgspec.structs.replace(timing, curve=curve)
        changed[place] = msgspec.structs.replace(trial, timing=timing, notes=(*trial.notes, note))
    return changed


def _batch(trial: Trial, goal: Goal) -> int:
    curve = trial.timing.curve if trial.timing else ()
    return curve[0].batch if goal == "latency" else max(curve, key=lambda found: found.rows_per_s).batch
