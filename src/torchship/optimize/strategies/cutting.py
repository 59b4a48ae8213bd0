"""Cutting: a module that does not export is kept as Python, whole or with the parts that export run elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchship import plugins
from torchship.errors import BuildFailed
from torchship.hardware import Hardware
from torchship.lowering import blueprint
from torchship.lowering.program import PROGRAM
from torchship.model import Model
from torchship.optimize.attempt import SearchContext
from torchship.optimize.strategies import Asked
from torchship.optimize.trial import Trial
from torchship.recipe import Options, Recipe

NAME = "hybrid"


class Cutting:
    """Asks for the module as Python, where no other engine took it."""

    def __init__(self, context: SearchContext, *, among: Sequence[str]) -> None:
        self._context, self._among = context, among
        self._waiting: list[Recipe] | None = None

    def ask(self, results: Sequence[Trial]) -> list[Asked]:
        """Whole first, for that stands in for eager; then with parts. Once: nothing where that was tried before."""
        if self._waiting is None:
            tried = any(trial.recipe.backend == NAME for trial in results)
            self._waiting = [] if tried else self.instead(results)
        if results:
            self._waiting = [recipe for recipe in self._waiting if recipe != results[-1].recipe]
        return [Asked(recipe, urgent=stands_in(recipe, results)) for recipe in self._waiting]

    def instead(self, results: Sequence[Trial]) -> list[Recipe]:
        """What to try where the first trial, eager, ended badly."""
        context = self._context
        return cut(results, context.model, source=context.config.source, hardware=context.hardware, among=self._among)


def stands_in(recipe: Recipe, results: Sequence[Trial]) -> bool:
    """Whether this is the user's own Python, whole, and there is nothing valid yet."""
    whole = recipe.backend == NAME and not recipe.options.keys() & {"parts", "precision"}
    return whole and not any(trial.status == "ok" for trial in results)


def cut(
    trials: Sequence[Trial], model: Model, *, source: str, hardware: Hardware, among: Sequence[str]
) -> list[Recipe]:
    """Recipes for a module that does not export: kept as Python, whole or with its parts run by `among`.

    None where a trial that exported it, or took it as a script into another engine, is valid.
    """
    taken = any(trial.status == "ok" and trial.recipe.backend != "torchscript" for trial in trials[1:])
    eager = trials[0]
    exported = eager.status == "ok" and (Path(eager.artifact) / "backend" / PROGRAM).is_file()
    if exported or taken or plugins.reason_against("backends", name=NAME, hardware=hardware):
        return []
    options: Options = {} if _is_plain(model) or ":" not in source else {"source": source}
    found = [Recipe(NAME, options)]
    for backend in ("onnxruntime", "openvino", "inductor"):
        if backend in among and not plugins.reason_against("backends", name=backend, hardware=hardware):
            found.append(Recipe(NAME, {**options, "parts": backend}))
    if hardware.has_bf16:
        found.append(Recipe(NAME, {**options, "precision": "bf16"}))
    return found


def _is_plain(model: Model) -> bool:
    """Whether the module can be written down without the function that made it."""
    inner: Any = model.module.inner
    try:
        blueprint.draw(inner)
    except BuildFailed:
        return False
    return True
