"""Best first: which recipe to try next, given what the others were good for."""

from __future__ import annotations

from collections.abc import Sequence

from torchship.optimize.choose import Goal, cost, is_valid
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe


def next_up(waiting: Sequence[Recipe], done: Sequence[Trial], *, goal: Goal) -> int:
    """The place in `waiting` of the recipe to try next.

    The first is the first: eager, the reference. Then what runs on an accelerator comes before what does not; among
    those, each backend's first proposal, in the given order, then the proposals of the backend whose best valid
    trial was best for the goal; one that was only refused so far counts as that good too. A backend that only failed
    comes last. Pure.
    """
    if not done:
        return 0
    places = [place for place, recipe in enumerate(waiting) if accelerated(recipe)] or list(range(len(waiting)))
    tried = {_group(trial.recipe) for trial in done}
    for place in places:
        if _group(waiting[place]) not in tried:
            return place
    best = {_group(trial.recipe): float("inf") for trial in done}
    for trial in done:
        if is_valid(trial) and trial.timing is not None:
            group = _group(trial.recipe)
            best[group] = min(best[group], cost(trial.timing, goal=goal))
    promising = min(best.values(), default=0.0)
    for trial in done:
        if trial.status == "refused":  # one recipe drifted; the same engine at another precision may still win
            group = _group(trial.recipe)
            best[group] = min(best[group], promising)
    return min(places, key=lambda place: (best[_group(waiting[place])], place))


def accelerated(recipe: Recipe) -> bool:
    """Whether a recipe asks for a device or an execution provider other than the processor."""
    wish = str(recipe.options.get("device") or recipe.options.get("provider") or "cpu").lower()
    return not wish.startswith("cpu")


def _group(recipe: Recipe) -> tuple[str, bool]:
    return recipe.backend, accelerated(recipe)
