"""Cuts a module that cannot be exported: finds the submodules that can stand alone, by watching calls go through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from torchship.errors import BadInput
from torchship.model import Model, to_numpy
from torchship.tensors import Axis, Free, Signature, Tensors, TensorSpec, dtype_name

_MOST_CALLS = 8


@dataclass
class Calls:
    """What went into one submodule and came out; `plain` while it was tensors in and one tensor out, by position."""

    inputs: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    plain: bool = True


class Part(nn.Module):
    """A submodule as a Model wants it: a tuple comes out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Call it."""
        return (self.inner(*tensors),)


def parts(model: Model, *, builds: Callable[[str, Model], bool]) -> list[str]:
    """Paths of the largest submodules of the user's module that `builds(path, model)` accepts, none inside another.

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
            if candidate is not None and builds(below, candidate):
                found.append(below)
            else:
                descend(child, below)

    descend(top, "")
    return found


def watch(model: Model, top: nn.Module) -> dict[str, Calls]:
    """The calls of every submodule while the model runs its examples, with one row more the second time."""
    calls: dict[str, Calls] = {}
    examples = list(model.examples[:3])
    if model.signature.batched and model.signature.max_rows > 2:
        examples.append({name: np.concatenate([a, a[:1]]) for name, a in model.examples[0].items()})
    with torch.inference_mode(), _hooked(top, calls):
        for example in examples:
            model.module(*model.torch_inputs(example))
    return calls


@contextmanager
def _hooked(top: nn.Module, calls: dict[str, Calls]) -> Iterator[None]:
    def hook_for(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen = calls.setdefault(path, Calls())
            tensors = bool(args) and all(isinstance(value, torch.Tensor) for value in (*args, output))
            seen.plain = seen.plain and tensors and not kwargs
            if seen.plain and len(seen.inputs) < _MOST_CALLS:
                seen.inputs.append(tuple(value.clone() for value in args))
                seen.outputs.append(output.clone())

        return hook

    hooks = [m.register_forward_hook(hook_for(path), with_kwargs=True) for path, m in top.named_modules() if path]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def as_model(module: nn.Module, seen: Calls, *, name: str, batched: bool) -> Model | None:
    """The submodule as a Model with the axes free whose length varied; None when its calls were not plain tensors."""
    if not seen.plain or not seen.inputs or len({len(call) for call in seen.inputs}) > 1:
        return None
    try:
        inputs = [_spec(f"x{i}", [call[i] for call in seen.inputs]) for i in range(len(seen.inputs[0]))]
        output = _spec("y", seen.outputs)
    except (BadInput, TypeError):
        return None
    if any(spec is None for spec in (*inputs, output)):
        return None
    specs = tuple(spec for spec in inputs if spec is not None)
    whole = (*specs, *((output,) if output else ()))
    rows = batched and all(spec.shape and isinstance(spec.shape[0], Free) for spec in whole)
    signature = Signature(specs, whole[-1:], rows)
    examples: list[Tensors] = [
        {spec.name: np.asarray(to_numpy(tensor)) for spec, tensor in zip(specs, call, strict=True)}
        for call in seen.inputs
    ]
    return Model(module=Part(module).eval(), signature=signature, examples=examples, calibration=examples, name=name)


def _spec(name: str, tensors: Sequence[torch.Tensor]) -> TensorSpec | None:
    if len({tensor.dim() for tensor in tensors}) > 1:
        return None
    axes: list[Axis] = []
    for lengths in zip(*(tensor.shape for tensor in tensors), strict=True):
        axes.append(lengths[0] if len(set(lengths)) == 1 else Free())
    return TensorSpec(name, dtype_name(np.asarray(to_numpy(tensors[0])).dtype), tuple(axes))
