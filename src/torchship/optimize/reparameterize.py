"""Fuses modules that offer it: branches that were only there for training become one convolution before anything else.

RepVGG (Ding et al., arXiv:2101.03697), MobileOne (Vasu et al., arXiv:2206.04040), RepGhost and their kin bring a method
for it; here it is called on a copy, and what it makes is kept only where it answers as before.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves

from torchship.lowering.program import one_line

METHODS = ("switch_to_deploy", "reparameterize")
_TOLERANCE = 1e-3  # relative: sums of the same products in another order


def fused(module: torch.nn.Module, run: Callable[[torch.nn.Module], object]) -> tuple[torch.nn.Module, list[str]]:
    """`module` with what offers it fused, and a note for the report; `run` calls a module on an example.

    The module itself, with a note why, where a method fails or changes the answers. Without such methods, as it is.
    """
    offers = [(path, name) for path, part in module.named_modules() for name in METHODS if _offers(part, name)]
    if isinstance(module, torch.jit.ScriptModule) or not offers:
        return module, []
    called = 0
    try:
        with torch.no_grad():  # not inference mode: weights that are made in it could never be fine-tuned
            made = copy.deepcopy(module)
            for path, name in offers:
                part = _part(made, path)
                if part is not None and _offers(part, name):  # its owner may have replaced it
                    getattr(part, name)()
                    called += 1
            made = made.eval().requires_grad_(False)
            error = _apart(run(module), run(made))
    except Exception as fault:
        return module, [f"not re-parameterized: {offers[0][1]} fails: {one_line(fault)}"]
    names = ", ".join(sorted({name for _, name in offers}))
    if not error <= _TOLERANCE:
        return module, [f"not re-parameterized: after {names} the answers are off by {error:.2g} of their size"]
    return made, [f"{called} modules were fused by their own {names}: the answers are off by {error:.2g} of their size"]


def _offers(part: torch.nn.Module, name: str) -> bool:
    method = getattr(type(part), name, None)
    if not inspect.isfunction(method):
        return False
    asked = list(inspect.signature(method).parameters.values())[1:]
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in asked)


def _part(module: torch.nn.Module, path: str) -> torch.nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _apart(wanted: object, found: object) -> float:
    """The largest relative error of an output; infinite where they are not of one kind."""
    pairs = [[leaf for leaf in tree_leaves(side) if isinstance(leaf, torch.Tensor)] for side in (wanted, found)]
    if [one.shape for one in pairs[0]] != [one.shape for one in pairs[1]]:
        return float("inf")
    errors = [
        float(torch.linalg.vector_norm((a - b).double()) / (torch.linalg.vector_norm(a.double()) + 1e-12))
        for a, b in zip(*pairs, strict=True)
        if a.is_floating_point()
    ]
    return max(errors, default=0.0)
