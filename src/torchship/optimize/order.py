"""Best first: which recipe to try next, given what the others were good for."""

from __future__ import annotations

from collections.abc import Sequence

from torchship.optimize.choose import Goal, cost, is_valid
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe


def next_up(waiting: Sequence[Recipe], done: Sequence[Trial], *, goal: Goal) -> int:
    """The place in `waiting` of the recipe to try next.

    First each backend's first proposal, in the given order; then the proposals of the backend whose best valid
    trial was best for the goal. A backend that only failed so far comes last. Pure.
    """
    tried = {trial.recipe.backend for trial in done}
    for place, recipe in enumerate(waiting):
        if recipe.backend not in tried:
            return place
    best = {trial.recipe.backend: float("inf") for trial in done}
    for trial in done:
        if is_valid(trial) and trial.timing is not None:
            best[trial.recipe.backend] = min(best[trial.recipe.backend], cost(trial.timing, goal=goal))
    return min(range(len(waiting)), key=lambda place: (best[waiting[place].backend], place))
