"""Whether a backend works on this machine's card at all: found out once in a child, with a tiny model, and remembered.

A backend whose compiled code may end the process that loads it names such a function as `TRIED_OUT`: it is given the
device and raises, or dies, where the backend does not work. The verdict holds for one torch, card and driver.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchship import hardware as machines
from torchship import plugins, process
from torchship.hardware import Hardware
from torchship.optimize.cache import Cache, digest
from torchship.optimize.choose import accelerated, device_of
from torchship.recipe import Recipe

SECONDS = 150.0  # for the tiny model: its compiler may need a minute


def needs_one(recipe: Recipe) -> bool:
    """Whether a recipe is for a card and a backend that must be tried out there first."""
    return accelerated(recipe) and bool(plugins.fact("backends", recipe.backend, "TRIED_OUT", ""))


def verdict(recipe: Recipe, *, cache: Cache, hardware: Hardware, left: float = 0.0) -> str | None:
    """Why the backend of `recipe` does not work on the card, in one line; empty where it does.

    None where that is not known, and `left` seconds are too few to find it out.
    """
    if not needs_one(recipe):
        return ""
    torch = machines.version("torch")
    key = digest(recipe.backend, device_of(recipe), torch, [(gpu.name, gpu.driver) for gpu in hardware.gpus])
    fault = cache.kept("probes", key, str)
    if fault is None:
        if left < SECONDS:
            return None
        target = str(plugins.fact("backends", recipe.backend, "TRIED_OUT"))
        fault = process.run(target, argument=device_of(recipe), timeout=SECONDS).fault
        cache.keep("probes", key, fault)
    if not fault:
        return ""
    card = ", ".join(sorted({gpu.name for gpu in hardware.gpus})) or device_of(recipe)
    return f"a tiny model does not run on the {card} with torch {torch}: {fault}"


def without_refused(
    recipes: Sequence[Recipe], *, cache: Cache, hardware: Hardware
) -> tuple[list[Recipe], dict[str, str]]:
    """The recipes without those that an earlier verdict speaks against, and the reason for each such backend."""
    faults = {recipe.key: verdict(recipe, cache=cache, hardware=hardware) for recipe in recipes}
    reasons = {f"{one.backend} on a card": why for one in recipes if (why := faults[one.key])}
    return [recipe for recipe in recipes if not faults[recipe.key]], reasons
