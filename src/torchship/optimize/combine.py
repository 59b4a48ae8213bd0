"""Recipes of backends times transforms: which transforms are worth trying under which backend."""

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
from torchship.optimize.trial import Trial
from torchship.plugins import missing
from torchship.recipe import Options, Recipe, Step

# Converters fuse, lay out and quantize by themselves; what stays torch gains from being changed before.
_TAKES = {"eager": ("fuse", "quantize"), "inductor": ("quantize",)}
_STATIC: Options = {"scheme": "static"}


def combined(model: Model, *, hardware: Hardware, among: Sequence[str]) -> list[tuple[int, Recipe]]:
    """Recipes with transforms for the backends in `among`, with their ranks behind the backends' own proposals.

    A transform takes part with what it proposes for this model; static int8 only where there is data to calibrate.
    """
    found: list[tuple[int, Recipe]] = []
    for backend in among:
        for rank, name in enumerate(_TAKES.get(backend, ())):
            if reason_against(name):
                continue
            steps: list[tuple[Step, ...]] = [(Step(name, options),) for options in _proposals(name, model, hardware)]
            if name == "quantize" and backend == "inductor" and model.calibration:
                # a module called twice, as torchvision's ReLUs are, stops the quantizer
                steps.insert(0, (Step("unshare"), Step(name, _STATIC)))
            found += [(2 + rank, Recipe(backend, {}, step)) for step in steps]
    return found


def reason_against(transform: str) -> str:
    """Why a transform cannot be applied here; empty when it can."""
    return missing("torchao") if transform == "quantize" else ""


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


def cut(
    trials: Sequence[Trial], model: Model, *, source: str, hardware: Hardware, among: Sequence[str]
) -> list[Recipe]:
    """Recipes for a module that does not export: kept as Python, whole or with its parts run by `among`.

    None where a trial that exported it, or took it as a script into another engine, is valid.
    """
    taken = any(trial.status == "ok" and trial.recipe.backend != "torchscript" for trial in trials[1:])
    eager = trials[0]
    exported = eager.status == "ok" and (Path(eager.artifact) / "backend" / PROGRAM).is_file()
    if exported or taken or plugins.reason_against("backends", name="hybrid", hardware=hardware):
        return []
    options: Options = {} if _is_plain(model) or ":" not in source else {"source": source}
    found = [Recipe("hybrid", options)]
    for backend in ("onnxruntime", "openvino", "inductor"):
        if backend in among and not plugins.reason_against("backends", name=backend, hardware=hardware):
            found.append(Recipe("hybrid", {**options, "parts": backend}))
    if hardware.has_bf16:
        found.append(Recipe("hybrid", {**options, "precision": "bf16"}))
    return found


def _is_plain(model: Model) -> bool:
    """Whether the module can be written down without the function that made it."""
    inner: Any = model.module.inner
    try:
        blueprint.draw(inner)
    except BuildFailed:
        return False
    return True
