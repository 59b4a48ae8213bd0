"""Cuts a module that cannot be exported: submodules that can stand alone are built, and later put into their places."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils import _pytree as pytree

from torchship.errors import BadInput, BuildFailed
from torchship.lowering.blueprint import Cut
from torchship.lowering.program import one_line
from torchship.lowering.variants import Wrapped, to_torch_dtype
from torchship.model import Model, to_numpy, to_torch
from torchship.recipe import Recipe
from torchship.stage import Stage
from torchship.tensors import Array, Axis, Free, Signature, Tensors, TensorSpec, dtype_name, numpy_dtype

_MOST_CALLS = 8


@dataclass
class Calls:
    """What went into one submodule and came out; `plain` while it was tensors in, by position, and tensors out, always
    in the same containers: `spec` is torch's description of these, as text.
    """

    inputs: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    outputs: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    spec: str = ""
    plain: bool = True


def cut(model: Model, recipe: Recipe, *, build: Callable[..., None], out: Path) -> list[Cut]:
    """Build the largest submodules of the user's module that `build` takes, none inside another, into `out/NUMBER`.

    Single layers are left alone: crossing over to another engine costs more than it brings. Raises BuildFailed where
    none is left.
    """
    top: Any = model.module.inner
    calls = watch(model, top)
    cuts: list[Cut] = []
    faults: list[str] = []

    def descend(module: nn.Module, above: str) -> None:
        for name, child in module.named_children():
            path = f"{above}{name}"
            if not any(True for _ in child.children()) or not any(True for _ in child.parameters()):
                continue
            seen = calls.get(path, Calls())
            part = _as_model(child, seen, name=path, batched=model.signature.batched)
            folder = out / str(len(cuts))
            try:
                if part is not None:
                    folder.mkdir(parents=True)
                    build(part, options=recipe.options, out=folder)
                    cuts.append(Cut(path, recipe, part.signature, seen.spec))
                    continue
            except Exception as fault:  # whatever stops it, its own submodules are tried next
                faults.append(f"{path}: {one_line(fault, limit=200)}")
                shutil.rmtree(folder)
            descend(child, f"{path}.")

    descend(top, "")
    if not cuts:
        words = "; ".join(faults[:2]) or "none has layers in it, takes tensors by position and gives one"
        raise BuildFailed(f"hybrid: no submodule can be built by {recipe.backend} ({words})")
    return cuts


def watch(model: Model, top: nn.Module) -> dict[str, Calls]:
    """The calls of every submodule while the model runs its examples, and one with longer free axes."""
    calls: dict[str, Calls] = {}
    paths = {module: path for path, module in top.named_modules() if path}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module not in paths:
            return
        seen = calls.setdefault(paths[module], Calls())
        leaves, tree = pytree.tree_flatten(output)
        try:
            spec = pytree.treespec_dumps(tree)
        except NotImplementedError:  # containers that cannot be described as text
            leaves, spec = [], ""
        tensors = bool(args) and all(isinstance(value, torch.Tensor) for value in (*args, *leaves))
        seen.plain = seen.plain and tensors and bool(leaves) and seen.spec in ("", spec) and not kwargs
        if seen.plain and len(seen.inputs) < _MOST_CALLS:
            seen.spec = spec
            seen.inputs.append(tuple(value.clone() for value in args))
            seen.outputs.append(tuple(value.clone() for value in leaves))

    handle = register_module_forward_hook(hook, with_kwargs=True)
    try:
        with torch.inference_mode():
            for example in model.examples[:3]:
                model.module(*model.torch_inputs(example))
            with contextlib.suppress(Exception):  # strides and windows allow only some lengths
                model.module(*model.torch_inputs(_longer(model)))
    finally:
        handle.remove()
    return calls


def _longer(model: Model) -> Tensors:
    """The first example with one more along every free axis that allows it."""
    found: dict[str, Array] = {}
    for spec in model.signature.inputs:
        array = model.examples[0][spec.name]
        for position, axis in enumerate(spec.shape):
            if isinstance(axis, Free) and (axis.max is None or array.shape[position] < axis.max):
                array = np.concatenate([array, array.take([0], axis=position)], axis=position)
        found[spec.name] = array
    return found


def _as_model(module: nn.Module, seen: Calls, *, name: str, batched: bool) -> Model | None:
    """The submodule as a Model with the axes free whose length varied; None when its calls were not plain tensors."""
    if not seen.plain or not seen.inputs or len({len(call) for call in seen.inputs}) > 1:
        return None
    try:
        inputs = tuple(_spec(f"x{i}", tensors) for i, tensors in enumerate(zip(*seen.inputs, strict=True)))
        outputs = tuple(_spec(f"y{i}", tensors) for i, tensors in enumerate(zip(*seen.outputs, strict=True)))
    except (BadInput, TypeError, ValueError):
        return None
    rows = batched and all(spec.shape and isinstance(spec.shape[0], Free) for spec in (*inputs, *outputs))
    examples: list[Tensors] = [
        {spec.name: to_numpy(tensor) for spec, tensor in zip(inputs, call, strict=True)} for call in seen.inputs
    ]
    whole = Wrapped(
        module, inputs=len(inputs), run=lambda flat, tensors: tuple(pytree.tree_leaves(flat(*tensors)))
    ).eval()
    signature = Signature(inputs, outputs, rows)
    return Model(module=whole, signature=signature, examples=examples, calibration=examples, name=name)


def _spec(name: str, tensors: Sequence[torch.Tensor]) -> TensorSpec:
    """A tensor's spec from its calls. Raises ValueError where these differ in their axes, TypeError or BadInput."""
    axes: list[Axis] = []
    for lengths in zip(*(tensor.shape for tensor in tensors), strict=True):
        axes.append(lengths[0] if len(set(lengths)) == 1 else Free())
    return TensorSpec(name, dtype_name(to_numpy(tensors[0]).dtype), tuple(axes))


class CutModule(nn.Module):
    """A stage in the place of a submodule, which still answers where the stage was not made for the shapes."""

    def __init__(self, stage: Stage, cut: Cut, eager: nn.Module) -> None:
        super().__init__()
        self.eager, self._stage, self._signature = eager, stage, cut.signature
        self._spec = pytree.treespec_loads(cut.spec)
        self._on_card: Any = getattr(stage, "on_card", None)  # a stage of a card takes and gives tensors that are there

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("eager"), name)

    def forward(self, *given: Any, **named: Any) -> Any:
        """Cross over to the stage and back."""
        if named or not all(isinstance(tensor, torch.Tensor) for tensor in given):
            return self.eager(*given, **named)
        if not _fits(self._signature, given):
            return self.eager(*given)
        if self._on_card is not None:
            return pytree.tree_unflatten(self._on_card(*given), self._spec)
        feed: Any = {f"x{i}": to_numpy(tensor) for i, tensor in enumerate(given)}
        answers = self._stage(feed)
        tensors = [to_torch(answers[out.name]).to(given[0].device) for out in self._signature.outputs]
        return pytree.tree_unflatten(tensors, self._spec)


def _fits(signature: Signature, given: Sequence[torch.Tensor]) -> bool:
    """Whether a stage of this signature takes these tensors, wherever they are."""
    if len(given) != len(signature.inputs):
        return False
    # an array of zeros that takes no memory has all that is checked
    shapes = {
        spec.name: np.broadcast_to(np.zeros((), numpy_dtype(spec.dtype)), tensor.shape)
        for spec, tensor in zip(signature.inputs, given, strict=True)
        if tensor.dtype == to_torch_dtype(spec.dtype)
    }
    try:
        signature.check(shapes)
    except BadInput:
        return False
    return True
