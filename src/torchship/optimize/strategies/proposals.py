"""Proposals: what each backend and transform suggests for a model, and which of it to try next, given the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torchship import plugins
from torchship.errors import BadConfig
from torchship.hardware import Hardware
from torchship.model import Model
from torchship.optimize.choose import Goal, cost, is_valid
from torchship.optimize.strategies import Asked
from torchship.optimize.strategies.cutting import stands_in
from torchship.optimize.trial import Trial
from torchship.recipe import Options, Recipe, Step

_HOPELESS = 8.0
_STATIC: Options = {"scheme": "static"}


class Proposals:
    """Asks for `recipes`, plain eager first, then best first.

    `instead` says what to try too where eager ends badly; with it goes what cannot win any more. A list of the caller's
    own, which has none, is tried to its end.
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        *,
        goal: Goal,
        instead: Callable[[Sequence[Trial]], Sequence[Recipe]] | None = None,
    ) -> None:
        self._waiting, self._goal, self._instead = list(recipes), goal, instead

    def ask(self, results: Sequence[Trial]) -> list[Asked]:
        """What is left, the next one first."""
        if results:
            self._waiting = [recipe for recipe in self._waiting if recipe != results[-1].recipe]
        if self._instead is not None and len(results) == 1 and results[0].status != "ok":
            self._waiting = [*self._instead(results), *self._waiting]
        if not self._waiting:
            return []
        first = self._waiting[next_up(self._waiting, results, goal=self._goal)]
        why = hopeless(first, results, goal=self._goal) if self._instead else ""
        urgent = not results or stands_in(first, results)
        return [Asked(first, skip=why, urgent=urgent), *(Asked(r) for r in self._waiting if r is not first)]


def propose(model: Model, *, hardware: Hardware, backends: Sequence[str] | None) -> tuple[list[Recipe], dict[str, str]]:
    """Recipes in the order to try them, eager first, then each backend's best guess; and why backends are left out.

    Raises BadConfig for a backend that does not exist.
    """
    known = plugins.names("backends")
    wanted = list(backends) if backends else sorted(known, key=lambda name: (_fact(name, "TRIED", 9), name))
    reasons: dict[str, str] = {}
    ranked: list[tuple[int, int, Recipe]] = []
    for place, name in enumerate(wanted):
        module = plugins.load("backends", name=name) if backends else None
        reason = plugins.reason_against("backends", name=name, hardware=hardware)
        if reason:
            reasons[name] = reason
            continue
        try:
            module = module or plugins.load("backends", name=name)
            found = module.propose(model, hardware=hardware)
        except Exception as fault:
            reasons[name] = f"its proposals failed: {type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
            continue
        ranked += [(rank, place, recipe) for rank, recipe in enumerate(found)]
        more = combined(model, hardware=hardware, among=[name])
        ranked += [(rank, place, recipe) for rank, recipe in more]
    if reason := reason_against("quantize"):
        reasons["torch's own int8"] = reason
    ranked.sort(key=lambda item: item[:2])
    eager = Recipe("eager")
    others = [recipe for _, _, recipe in ranked if recipe != eager]
    return [eager, *{recipe.key: recipe for recipe in others}.values()], reasons


def combined(model: Model, *, hardware: Hardware, among: Sequence[str]) -> list[tuple[int, Recipe]]:
    """Recipes with transforms for the backends in `among`, with their ranks behind the backends' own proposals.

    A transform takes part with what it proposes for this model; static int8 only where there is data to calibrate.
    """
    found: list[tuple[int, Recipe]] = []
    for backend in among:
        for rank, name in enumerate(_fact(backend, "TAKES", ())):
            if reason_against(name):
                continue
            steps: list[tuple[Step, ...]] = [(Step(name, options),) for options in _proposals(name, model, hardware)]
            if name == "quantize" and _fact(backend, "TRACES", False) and model.calibration:
                # a module called twice, as torchvision's ReLUs are, stops the quantizer
                steps.insert(0, (Step("unshare"), Step(name, _STATIC)))
            found += [(2 + rank, Recipe(backend, {}, step)) for step in steps]
    return found


def reason_against(transform: str) -> str:
    """Why a transform cannot be applied here; empty when it can."""
    return plugins.missing("torchao") if transform == "quantize" else ""


def equalized(recipe: Recipe, *, model: Model, hardware: Hardware) -> Recipe | None:
    """The recipe with cross-layer equalization before all else, where the model has layers for it."""
    if any(step.transform == "equalize" for step in recipe.transforms):
        return None
    for options in _proposals("equalize", model, hardware):
        return Recipe(recipe.backend, recipe.options, (Step("equalize", options), *recipe.transforms))
    return None


def _proposals(name: str, model: Model, hardware: Hardware) -> list[Options]:
    if name not in plugins.names("transforms"):
        return []
    propose = getattr(plugins.load("transforms", name=name), "propose", None)
    return [] if propose is None else list(propose(model, hardware=hardware))


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
    quick = [place for place in places if not _fact(waiting[place].backend, "COMPILES", False)]
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


def _fact(backend: str, name: str, default: Any) -> Any:
    """What a backend's module says about itself; the default for one that says nothing, or is not there."""
    try:
        return getattr(plugins.load("backends", name=backend), name, default)
    except (BadConfig, ImportError):
        return default
