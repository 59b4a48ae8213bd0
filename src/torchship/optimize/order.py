"""Best first: which recipe to try next, given what the others were good for."""

from __future__ import annotations

from collections.abc import Sequence

from torchship.optimize.choose import Goal, cost, is_valid
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe

_COMPILERS = ("aoti", "executorch", "inductor")  # they take from half a minute upwards
_HOPELESS = 8.0


def next_up(waiting: Sequence[Recipe], done: Sequence[Trial], *, goal: Goal) -> int:
    """The place in `waiting` of the recipe to try next.

    The first is the first: eager, the reference. Then what runs on an accelerator comes before what does not. Among
    those, the first proposal of each engine that builds in seconds, in the given order; what else the best of these
    proposes; the first proposal of each compiler; then the proposals of the engine whose best valid trial was best for
    the goal. An engine that was only refused so far counts as the best, one that only failed comes last. Pure.
    """
    if not done:
        return 0
    places = [place for place, recipe in enumerate(waiting) if accelerated(recipe)] or list(range(len(waiting)))
    best = _best(done, goal)
    leader = min(best.values())
    quick = [place for place in places if waiting[place].backend not in _COMPILERS]
    for found in (
        [place for place in quick if _group(waiting[place]) not in best],
        [place for place in quick if best.get(_group(waiting[place])) == leader],
        [place for place in places if _group(waiting[place]) not in best],
    ):
        if found:
            return found[0]
    return min(places, key=lambda place: (best[_group(waiting[place])], place))


def _best(done: Sequence[Trial], goal: Goal) -> dict[tuple[str, bool], float]:
    """The best cost of each engine; of one that only drifted, that of the best of all: another precision may win."""
    found = {_group(trial.recipe): float("inf") for trial in done}
    for trial in done:
        if is_valid(trial) and trial.timing is not None:
            group = _group(trial.recipe)
            found[group] = min(found[group], cost(trial.timing, goal=goal))
    leader = min(found.values())
    for trial in done:
        if trial.status == "refused":
            found[_group(trial.recipe)] = min(found[_group(trial.recipe)], leader)
    return found


def hopeless(recipe: Recipe, done: Sequence[Trial], *, goal: Goal) -> str:
    """Why `recipe` is not worth a trial: the best of its engine so far is eight times worse than the best of all, more
    than precision or layout ever make up for. Empty when it is worth one. Pure.
    """
    measured = [trial for trial in done if trial.timing is not None and trial.timing.curve]
    own = [cost(t.timing, goal=goal) for t in measured if _group(t.recipe) == _group(recipe) and t.timing]
    best = [cost(t.timing, goal=goal) for t in measured if is_valid(t) and t.timing]
    if not own or not best or min(own) < _HOPELESS * min(best):
        return ""
    return (
        f"not tried: the best of {recipe.backend} so far is {min(own) / min(best):.0f} times worse than the best of all"
    )


def accelerated(recipe: Recipe) -> bool:
    """Whether a recipe asks for a device or an execution provider other than the processor."""
    wish = str(recipe.options.get("device") or recipe.options.get("provider") or "cpu").lower()
    return not wish.startswith("cpu")


def _group(recipe: Recipe) -> tuple[str, bool]:
    return recipe.backend, accelerated(recipe)
