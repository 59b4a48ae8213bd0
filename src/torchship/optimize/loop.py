"""The loop of a search: ask a strategy, attempt what it wants most, tell everybody; until nobody asks or time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import msgspec

from torchship.optimize.attempt import SearchContext, attempt, known
from torchship.optimize.strategies import Asked, Strategy
from torchship.optimize.trial import Trial

OnTrial: TypeAlias = Callable[[Trial, int, int], None]
_LEAST_S = 60.0  # of an urgent attempt, whatever the budget


def run(
    strategies: Sequence[Strategy], *, context: SearchContext, on_trial: OnTrial | None = None
) -> tuple[list[Trial], bool]:
    """The trials in their order, and whether the user interrupted; what the budget did not reach is skipped.

    The first strategy that wants something has its way. Once time is up, what the first one still wants is told as
    skipped, and the second is asked where nothing is valid yet.
    """
    done: list[Trial] = []
    interrupted = False

    def tell(trial: Trial, waiting: int) -> bool:
        done.append(trial)
        try:
            if on_trial is not None:
                on_trial(trial, len(done), len(done) + waiting)
        except KeyboardInterrupt:
            return True
        return False

    while not interrupted and (waiting := _asked(strategies, done, context)):
        try:
            found = _tried(waiting[0], done, context)
        except KeyboardInterrupt:
            interrupted = True
            found = _skipped(waiting[0], "interrupted")
        interrupted = tell(found, len(waiting) - 1) or interrupted
    for left in strategies[0].ask(done) if interrupted else ():
        tell(_skipped(left, "interrupted"), 0)
    return done, interrupted


def _asked(strategies: Sequence[Strategy], done: Sequence[Trial], context: SearchContext) -> list[Asked]:
    late = time.monotonic() > context.deadline
    won = any(trial.status == "ok" for trial in done)
    for strategy in strategies[: (1 if won else 2) if late else None]:
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
    where = replace(context, tuned=True, model_hash=asked.tuned) if asked.tuned else context
    found = attempt(recipe, context=where, left=max(left, _LEAST_S) if asked.urgent else left, done=done)
    return msgspec.structs.replace(found, notes=(*found.notes, asked.note)) if asked.note else found


def _skipped(asked: Asked, why: str) -> Trial:
    return Trial(asked.recipe, "skipped", failure=why)
