"""The loop of a search: ask a strategy, attempt what it wants most, tell everybody; until nobody asks or time is up.

In the end candidates that lie close are measured again, interleaved, so that noise does not pick the winner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from torchship.artifact.manifest import BatchPoint
from torchship.optimize.attempt import LEAST_S, SearchContext, attempt, completed, known, rejudged
from torchship.optimize.cache import digest
from torchship.optimize.choose import Choice, Goal, baseline_place, cost, is_plain, is_valid
from torchship.optimize.measure import interleaved, point
from torchship.optimize.strategies import Asked, Strategy
from torchship.optimize.trial import Trial

OnTrial: TypeAlias = Callable[[Trial, int, int], None]
_CLOSE, _MOST = 1.15, 4  # how far from the best, and how many, are measured again
_FEWEST = 5  # calls that make a point
_TRIED_ON_FEW = 4  # trials at most that are judged on a part of the rows


def run(
    strategies: Sequence[Strategy], *, context: SearchContext, on_trial: OnTrial | None = None
) -> tuple[list[Trial], bool]:
    """The trials in their order, and whether the user interrupted; what the budget did not reach is skipped.

    The first strategy that wants something has its way, those before all others that are `at_once`. Once time is up,
    what the first one still wants is told as skipped, and the second is asked where nothing is valid yet. Where the
    reference begins with few rows, it answers all as soon as something is valid on them; what was judged before is
    judged again, and told again.
    """
    done: list[Trial] = []
    interrupted = False

    def tell(trial: Trial, waiting: int) -> bool:
        try:
            if on_trial is not None:
                on_trial(trial, len(done), len(done) + waiting)
        except KeyboardInterrupt:
            return True
        return False

    while not interrupted:
        try:
            waiting = _asked(strategies, done, context)
        except KeyboardInterrupt:  # while a strategy trained
            interrupted = True
            break
        if _has_come_to_grow(context, done, waiting):
            try:
                context.reference.grow()
                for place, before in enumerate(done):
                    done[place] = rejudged(before, context=context)
                    if done[place] is not before:
                        interrupted = tell(done[place], len(waiting)) or interrupted
            except KeyboardInterrupt:
                interrupted = True
            continue
        if not waiting:
            break
        try:
            found = _tried(waiting[0], done, context)
        except KeyboardInterrupt:
            interrupted = True
            found = _skipped(waiting[0], "interrupted")
        done.append(found)
        interrupted = tell(found, len(waiting) - 1) or interrupted
    for left in strategies[0].ask(done) if interrupted else ():
        done.append(_skipped(left, "interrupted"))
        tell(done[-1], 0)
    return done, interrupted


def _has_come_to_grow(context: SearchContext, done: Sequence[Trial], waiting: Sequence[Asked]) -> bool:
    """Whether the reference is to answer all rows now: the module as it is has been tried on a few, and something else
    is valid on them or nothing is found; and there is time for it."""
    reference = context.reference
    if reference.whole or time.monotonic() + reference.left_s > context.deadline:
        return False
    plain = [is_plain(trial.recipe) for trial in done]
    won = any(plain) and any(is_valid(trial) and not own for trial, own in zip(done, plain, strict=True))
    return won or len(done) >= _TRIED_ON_FEW or not waiting


def _asked(strategies: Sequence[Strategy], done: Sequence[Trial], context: SearchContext) -> list[Asked]:
    late = time.monotonic() > context.deadline
    won = any(trial.status == "ok" for trial in done)
    hurried = [] if late else [strategy for strategy in strategies if getattr(strategy, "at_once", False)]
    for strategy in (*hurried, *strategies[: (1 if won else 2) if late else None]):
        if asked := strategy.ask(done):
            return asked
    return []


def _tried(asked: Asked, done: Sequence[Trial], context: SearchContext) -> Trial:
    recipe, left = asked.recipe, context.deadline - time.monotonic()
    if asked.failure:
        return Trial(recipe, "failed", failure=asked.failure)
    if left <= 0 and not asked.urgent:  # what is known costs no time
        return known(recipe, context) or _skipped(asked, "the budget was used up")
    if asked.skip:
        return _skipped(asked, asked.skip)
    found = attempt(recipe, context=context, left=max(left, LEAST_S) if asked.urgent else left, done=done)
    return msgspec.structs.replace(found, notes=(*found.notes, asked.note)) if asked.note else found


def _skipped(asked: Asked, why: str) -> Trial:
    return Trial(asked.recipe, "skipped", failure=why)


def remeasured(trials: Sequence[Trial], choice: Choice, *, context: SearchContext) -> list[Trial]:
    """The trials with the whole curve of the winner and of plain eager, and with one point of the close ones' curve
    measured again. Late, all that is done is to complete the winner.
    """
    config, changed = context.config, list(trials)
    eager = baseline_place(trials, choice.ranking)
    for place in dict.fromkeys((choice.winner, eager)):
        if place is not None and (place == choice.winner or time.monotonic() < context.deadline):
            changed[place] = completed(changed[place], context=context)
    places = close_ones(trials, choice, goal=config.goal)
    if not places or time.monotonic() > context.deadline:
        return changed
    batches = {place: _batch(trials[place], config.goal) for place in places}
    key = digest([(trials[place].key, batches[place]) for place in places])
    points = context.cache.kept("remeasured", key, dict[int, BatchPoint])
    if points is None:
        contestants = [(Path(trials[place].artifact), batch) for place, batch in batches.items()]
        seconds = interleaved(contestants, device=config.device, threads=config.threads, deadline=context.deadline)
        samples = zip(batches.items(), seconds, strict=True)
        points = {place: point(taken, batch=batch) for (place, batch), taken in samples if len(taken) >= _FEWEST}
        context.cache.keep("remeasured", key, points)
    for place, found in points.items():
        trial, timing = changed[place], changed[place].timing
        assert timing is not None  # noqa: S101  # only measured trials are measured again
        curve = tuple(found if old.batch == found.batch else old for old in timing.curve)
        note = f"batch {found.batch} was measured again in turns with {len(points) - 1} others"
        timing = msgspec.structs.replace(timing, curve=curve)
        changed[place] = msgspec.structs.replace(trial, timing=timing, notes=(*trial.notes, note))
    return changed


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


def _batch(trial: Trial, goal: Goal) -> int:
    curve = trial.timing.curve if trial.timing else ()
    return curve[0].batch if goal == "latency" else max(curve, key=lambda found: found.rows_per_s).batch
