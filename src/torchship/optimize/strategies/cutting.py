"""Cutting: a module that does not export is kept as Python, whole or with the parts that export run elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchship import plugins
from torchship.hardware import Hardware
from torchship.lowering.program import PROGRAM
from torchship.model import Model
from torchship.optimize.attempt import SearchContext
from torchship.optimize.choose import accelerated, device_of, is_plain
from torchship.optimize.strategies import Asked
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe


class Cutting:
    """Asks for the module as Python, where no other engine took it."""

    def __init__(self, context: SearchContext) -> None:
        self._context = context
        self._waiting: list[Recipe] | None = None

    def ask(self, results: Sequence[Trial]) -> list[Asked]:
        """Whole first, for that stands in for eager; then with parts. Once: nothing where that was tried before."""
        if self._waiting is None:
            tried = {trial.recipe.key for trial in results}
            self._waiting = [recipe for recipe in self._offered(results) if recipe.key not in tried]
        if results:
            self._waiting = [recipe for recipe in self._waiting if recipe != results[-1].recipe]
        return [Asked(recipe, urgent=stands_in(recipe, results)) for recipe in self._waiting]

    def instead(self, results: Sequence[Trial]) -> list[Recipe]:
        """What to try where the first trial, eager, ended badly; where it runs as a script on the processor, what an
        accelerator makes of the module as Python, for scripts run there in fp32 alone."""
        offered = self._offered(results)
        return [recipe for recipe in offered if accelerated(recipe) or results[0].status != "ok"]

    def _offered(self, results: Sequence[Trial]) -> list[Recipe]:
        context = self._context
        among = context.config.backends or plugins.names("backends")
        return cut(results, context.model, source=context.config.source, hardware=context.hardware, among=among)


def stands_in(recipe: Recipe, results: Sequence[Trial]) -> bool:
    """Whether this is the user's own module, unchanged, and nothing valid has run yet: on its device where that is an
    accelerator, for an artifact is never to be slower than that."""
    device = device_of(recipe)
    ran = any(trial.status == "ok" and device in ("cpu", device_of(trial.recipe)) for trial in results)
    return is_plain(recipe, device=device) and not ran


def cut(
    trials: Sequence[Trial], model: Model, *, source: str, hardware: Hardware, among: Sequence[str]
) -> list[Recipe]:
    """What the backends that keep a module as Python, with its parts run by some `among` all, would do.

    None where a trial that exported it, or took it as a script into another engine, is valid.
    """
    eager, *others = sorted(trials, key=lambda trial: not is_plain(trial.recipe))
    exported = eager.status == "ok" and (Path(eager.artifact) / "backend" / PROGRAM).is_file()
    valid = [trial.recipe.backend for trial in others if trial.status == "ok"]
    if exported or not all(plugins.fact("backends", name, "REPLAYS", False) for name in valid):
        return []
    found = list[Recipe]()
    for name in plugins.names("backends"):
        offer = plugins.fact("backends", name, "stand_in")
        if offer is not None and not plugins.reason_against("backends", name=name, hardware=hardware):
            found += offer(model, source=source, hardware=hardware, among=among)
    return found
