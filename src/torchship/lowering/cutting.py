"""Cuts a module that cannot be exported: finds the submodules that can stand alone, by watching calls go through."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchship.errors import BadInput
from torchship.lowering.variants import Wrapped
from torchship.model import Model, to_numpy
from torchship.tensors import Array, Axis, Free, Signature, Tensors, TensorSpec, dtype_name

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


class SubmoduleCall(Wrapped):
    """A submodule as a Model wants it: a tuple comes out."""

    def run(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Call it."""
        return tuple(pytree.tree_leaves(self.flat(*tensors)))


def parts(model: Model, *, builds: Callable[[str, Model, str], bool]) -> list[str]:
    """Paths of the largest submodules of the user's module that `builds(path, model, spec)` accepts, none inside
    another; `spec` says in what containers its outputs come.

    Single layers are left alone: crossing over to another engine costs more than it brings.
    """
    top: Any = model.module.inner
    calls = watch(model, top)
    found: list[str] = []

    def descend(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            below = f"{path}.{name}" if path else name
            if not any(True for _ in child.children()) or not any(True for _ in child.parameters()):
                continue
            seen = calls.get(below)
            candidate = None if seen is None else as_model(child, seen, name=below, batched=model.signature.batched)
            if candidate is not None and seen and builds(below, candidate, seen.spec):
                found.append(below)
            else:
                descend(child, below)

    descend(top, "")
    return found


def watch(model: Model, top: nn.Module) -> dict[str, Calls]:
    """The calls of every submodule while the model runs its examples, and one with longer free axes."""
    calls: dict[str, Calls] = {}
    with torch.inference_mode(), _hooked(top, calls):
        for example in model.examples[:3]:
            model.module(*model.torch_inputs(example))
        with contextlib.suppress(Exception):  # strides and windows allow only some lengths
            model.module(*model.torch_inputs(_longer(model)))
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


@contextlib.contextmanager
def _hooked(top: nn.Module, calls: dict[str, Calls]) -> Iterator[None]:
    def hook_for(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen = calls.setdefault(path, Calls())
            leaves, spec = _taken_apart(output)
            tensors = bool(args) and all(isinstance(value, torch.Tensor) for value in (*args, *leaves))
            seen.plain = seen.plain and tensors and bool(leaves) and seen.spec in ("", spec) and not kwargs
            if seen.plain and len(seen.inputs) < _MOST_CALLS:
                seen.spec = spec
                seen.inputs.append(tuple(value.clone() for value in args))
                seen.outputs.append(tuple(value.clone() for value in leaves))

        return hook

    hooks = [m.register_forward_hook(hook_for(path), with_kwargs=True) for path, m in top.named_modules() if path]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _taken_apart(output: Any) -> tuple[list[Any], str]:
    """The leaves of nested containers and their description; none for containers that cannot be described as text."""
    leaves, spec = pytree.tree_flatten(output)
    try:
        return leaves, pytree.treespec_dumps(spec)
    except NotImplementedError:
        return [], ""


def as_model(module: nn.Module, seen: Calls, *, name: str, batched: bool) -> Model | None:
    """The submodule as a Model with the axes free whose length varied; None when its calls were not plain tensors."""
    if not seen.plain or not seen.inputs or len({len(call) for call in seen.inputs}) > 1:
        return None
    try:
        inputs = [_spec(f"x{i}", [call[i] for call in seen.inputs]) for i in range(len(seen.inputs[0]))]
        outputs = [_spec(f"y{i}", [call[i] for call in seen.outputs]) for i in range(len(seen.outputs[0]))]
    except (BadInput, TypeError):
        return None
    whole = [spec for spec in (*inputs, *outputs) if spec is not None]
    if len(whole) < len(inputs) + len(outputs):
        return None
    specs = tuple(whole[: len(inputs)])
    rows = batched and all(spec.shape and isinstance(spec.shape[0], Free) for spec in whole)
    signature = Signature(specs, tuple(whole[len(inputs) :]), rows)
    examples: list[Tensors] = [
        {spec.name: np.asarray(to_numpy(tensor)) for spec, tensor in zip(specs, call, strict=True)}
        for call in seen.inputs
    ]
    return Model(
        module=SubmoduleCall(module, inputs=len(specs)).eval(),
        signature=signature,
        examples=examples,
        calibration=examples,
        name=name,
    )


def _spec(name: str, tensors: Sequence[torch.Tensor]) -> TensorSpec | None:
    if len({tensor.dim() for tensor in tensors}) > 1:
        return None
    axes: list[Axis] = []
    for lengths in zip(*(tensor.shape for tensor in tensors), strict=True):
        axes.append(lengths[0] if len(set(lengths)) == 1 else Free())
    return TensorSpec(name, dtype_name(np.asarray(to_numpy(tensors[0])).dtype), tuple(axes))
