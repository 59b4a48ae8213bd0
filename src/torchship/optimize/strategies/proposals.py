"""Proposals: what each backend and transform suggests for a model, and which of it to try next, given the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchship import plugins
from torchship.hardware import Hardware
from torchship.model import Model
from torchship.optimize.choose import Goal, accelerated, baseline, cost, device_of, is_plain, is_valid
from torchship.optimize.probes import needs_one
from torchship.optimize.strategies import Asked
from torchship.optimize.strategies.cutting import stands_in
from torchship.optimize.trial import Trial
from torchship.recipe import Options, Recipe, Step

_HOPELESS = 8.0


class Proposals:
    """Asks for `recipes`, plain eager first, then those whose labels are among the `favourites`, then best first.

    Where eager takes long, the first favourite comes before it: the search is `hurried`.
    `instead` says what to try too where eager ends badly; with it goes what cannot win any more. A list of the caller's
    own, which has none, is tried to its end.
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        *,
        goal: Goal,
        instead: Callable[[Sequence[Trial]], Sequence[Recipe]] | None = None,
        favourites: Sequence[str] = (),
        hurried: bool = False,
    ) -> None:
        self._waiting, self._goal, self._instead = list(recipes), goal, instead
        self._first, self._favourites, self._hurried = recipes[0], favourites, hurried

    def ask(self, results: Sequence[Trial]) -> list[Asked]:
        """What is left, the next one first."""
        results = sorted(results, key=lambda trial: trial.recipe != self._first)
        told = [trial.recipe for trial in results]
        if self._instead is not None and self._first in told and self._first in self._waiting:
            self._waiting = [*self._instead(results), *self._waiting]
        self._waiting = [recipe for recipe in self._waiting if recipe not in told]
        if not self._waiting:
            return []
        ready = self._first in told or (self._hurried and not told)
        liked = {recipe.label: recipe for recipe in self._waiting if ready}
        first = self._waiting[next_up(self._waiting, results, goal=self._goal) if self._first in told else 0]
        if not (told and stands_in(first, results)):
            first = next((liked[label] for label in self._favourites if label in liked), first)
        why = hopeless(first, results, goal=self._goal) if self._instead else ""
        return [
            Asked(first, skip=why, urgent=stands_in(first, results)),
            *(Asked(r) for r in self._waiting if r is not first),
        ]


def propose(
    model: Model, *, hardware: Hardware, backends: Sequence[str] | None, device: str = "cpu"
) -> tuple[list[Recipe], dict[str, str]]:
    """Recipes in the order to try them, eager first, then each backend's best guess; and why backends are left out.

    `device` is where the caller has all of them run: they name it, for what is measured there is to be served there.
    Raises BadConfig for a backend that does not exist.
    """
    for name in backends or ():
        plugins.load("backends", name=name)
    wanted = backends or sorted(
        plugins.names("backends"), key=lambda name: (plugins.fact("backends", name, "TRIED", 9), name)
    )
    reasons: dict[str, str] = {}
    ranked: list[tuple[int, int, Recipe]] = []
    for place, name in enumerate(wanted):
        if reason := plugins.reason_against("backends", name=name, hardware=hardware):
            reasons[name] = reason
            continue
        try:
            found = plugins.load("backends", name=name).propose(model, hardware=hardware)
        except Exception as fault:
            reasons[name] = f"its proposals failed: {type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
            continue
        on_card = [recipe for recipe in found if accelerated(recipe) and not _plain(recipe)]
        others = [recipe for recipe in found if recipe not in on_card]
        ranked += [(rank, place, recipe) for group in (on_card, others) for rank, recipe in enumerate(group)]
        ranked += [(rank, place, recipe) for rank, recipe in combined(model, hardware=hardware, backend=name)]
    for name in plugins.names("transforms"):
        if reason := _reason_against(name):
            reasons[plugins.fact("transforms", name, "TITLE", name)] = reason
    ranked.sort(key=lambda item: item[:2])
    recipes = [baseline(), *(_placed(recipe, device) for _, _, recipe in ranked)]
    return list({recipe.key: recipe for recipe in recipes}.values()), reasons


def _placed(recipe: Recipe, device: str) -> Recipe:
    if (
        device == "cpu"
        or accelerated(recipe)
        or "device" not in plugins.fact("backends", recipe.backend, "OPTIONS", ())
    ):
        return recipe
    return Recipe(recipe.backend, {**recipe.options, "device": device}, recipe.transforms)


def combined(model: Model, *, hardware: Hardware, backend: str) -> list[tuple[int, Recipe]]:
    """Recipes with the transforms that a backend gains from, with their ranks behind the backend's own proposals.

    A transform takes part with what it proposes for this model; the backend's calibrated steps where there is data.
    """
    found: list[tuple[int, tuple[Step, ...]]] = []
    calibrated: tuple[Step, ...] = plugins.fact("backends", backend, "CALIBRATED", ()) if model.calibration else ()
    for rank, name in enumerate(plugins.fact("backends", backend, "TAKES", ()), 2):
        if _reason_against(name):
            continue
        if any(step.transform == name for step in calibrated):
            found.append((rank, calibrated))
        found += [(rank, (Step(name, options),)) for options in _proposals(name, model, hardware)]
    return [(rank, Recipe(backend, _beside(steps), steps)) for rank, steps in found]


def _beside(steps: Sequence[Step]) -> Options:
    """What the transforms want a backend's recipe to say beside them."""
    found: Options = {}
    for step in steps:
        found |= plugins.fact("transforms", step.transform, "RUNS_WITH") or {}
    return found


def _reason_against(transform: str) -> str:
    """Why a transform cannot be applied here; empty when it can."""
    return plugins.missing(plugins.fact("transforms", transform, "NEEDS", ""))


def equalized(recipe: Recipe, *, model: Model, hardware: Hardware) -> Recipe | None:
    """The recipe with what makes a model easier for int8 (cross-layer equalization) before all else.

    None where the model has no layers for it, or the recipe has it already.
    """
    done = {step.transform for step in recipe.transforms}
    for name in plugins.names("transforms"):
        if plugins.fact("transforms", name, "EASES", "") == "int8" and name not in done:
            for options in _proposals(name, model, hardware):
                return Recipe(recipe.backend, recipe.options, (Step(name, options), *recipe.transforms))
    return None


def _proposals(name: str, model: Model, hardware: Hardware) -> list[Options]:
    propose = plugins.fact("transforms", name, "propose")
    return [] if propose is None else list(propose(model, hardware=hardware))


def next_up(waiting: Sequence[Recipe], done: Sequence[Trial], *, goal: Goal) -> int:
    """The place in `waiting` of the recipe to try next.

    The first is the first: eager, the reference. Then what runs on an accelerator comes before what does not, and the
    module as it is before all, which gains are told against. Among those, the first proposal of each engine that
    builds in seconds, in the given order, but for those that rarely win on a processor; what else the best of these
    proposes; the first proposal of each of the others, compilers last; then the proposals of the engine whose best
    valid trial was best for the goal. An engine that was only refused so far counts as the best, one that only failed,
    or must be tried out on the card first, comes last. Pure.
    """
    if not done:
        return 0
    places = [place for place, recipe in enumerate(waiting) if accelerated(recipe)] or list(range(len(waiting)))
    failed = {trial.recipe.backend for trial in done if trial.status == "failed"}
    for place in places:
        recipe = waiting[place]
        if stands_in(recipe, done) and recipe.backend not in failed:
            return place
    best = _best(done, goal)
    leader = min(best.values(), default=0.0)
    quick = [place for place in places if not plugins.fact("backends", waiting[place].backend, "COMPILES", False)]
    often = [place for place in quick if accelerated(waiting[place]) or not rarely(waiting[place])]
    for found in (
        [place for place in often if _engine(waiting[place]) not in best],
        [place for place in quick if best.get(_engine(waiting[place])) == leader],
        [place for place in quick if _engine(waiting[place]) not in best and not needs_one(waiting[place])],
        [place for place in places if _engine(waiting[place]) not in best and not needs_one(waiting[place])],
    ):
        if found:
            return found[0]
    return min(places, key=lambda place: (best.get(_engine(waiting[place]), float("inf")), place))


def _best(done: Sequence[Trial], goal: Goal) -> dict[tuple[str, bool], float]:
    """The best cost of each engine; of one that only drifted, that of the best of all: another precision may win.

    The module as it is on an accelerator is what gains are told against: it says nothing about its engine.
    """
    found: dict[tuple[str, bool], float] = {}
    for trial in done:
        if accelerated(trial.recipe) and _plain(trial.recipe):
            continue
        price = cost(trial, goal=goal) if is_valid(trial) else float("inf")
        found[_engine(trial.recipe)] = min(found.get(_engine(trial.recipe), price), price)
    leader = min(found.values(), default=0.0)
    return found | {_engine(trial.recipe): leader for trial in done if trial.status == "refused"}


def rarely(recipe: Recipe) -> bool:
    """Whether a recipe's backend hardly ever wins on a processor, as it says itself."""
    return bool(plugins.fact("backends", recipe.backend, "RARELY", False))


def hopeless(recipe: Recipe, done: Sequence[Trial], *, goal: Goal) -> str:
    """Why `recipe` is not worth a trial: the best of its engine so far is eight times worse than the best of all, more
    than precision or layout ever make up for; or the engine failed to build this model twice, or once where the
    reference could not be built either. Empty when it is worth one. Pure.
    """
    tries = [trial for trial in done if _engine(trial.recipe) == _engine(recipe)]
    if tries and all(map(_not_built, tries)) and (len(tries) > 1 or _not_built(done[0])):
        return f"not tried: {recipe.backend} cannot build this model, see {tries[0].recipe.label}"
    measured = [trial for trial in done if trial.timing is not None and trial.timing.curve]
    own = min((cost(t, goal=goal) for t in measured if _engine(t.recipe) == _engine(recipe)), default=None)
    best = min((cost(t, goal=goal) for t in measured if is_valid(t)), default=None)
    if own is None or best is None or own < _HOPELESS * best:
        return ""
    return f"not tried: the best of {recipe.backend} so far is {own / best:.0f} times worse than the best of all"


def _plain(recipe: Recipe) -> bool:
    return is_plain(recipe, device=device_of(recipe))


def _not_built(trial: Trial) -> bool:
    return trial.status == "failed" and trial.failure.startswith("build: ")


def _engine(recipe: Recipe) -> tuple[str, bool]:
    return recipe.backend, accelerated(recipe)
