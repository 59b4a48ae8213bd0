"""The same model in another precision or memory layout: wrappers around its flat module that export like any other.

A wrapper keeps the flat module at `.flat` and the user's own module at `.inner`; tensors keep the dtypes of the
signature at the edge, whatever happens inside.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any, TypeAlias

import numpy as np
import torch

from torchship.errors import BadConfig
from torchship.lowering import paths
from torchship.lowering.paths import Rules
from torchship.model import Model, to_torch
from torchship.recipe import Options
from torchship.tensors import numpy_dtype

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
TorchTensors: TypeAlias = tuple[torch.Tensor, ...]


class Wrapped(torch.nn.Module):
    """`flat` with something done to its tensors before and after: `run(flat, tensors)` gives the tuple of answers."""

    def __init__(self, flat: torch.nn.Module, *, inputs: int, run: Callable[[Any, TorchTensors], TorchTensors]) -> None:
        super().__init__()
        self.flat, self.run = flat, run
        names = ", ".join(f"t{i}" for i in range(inputs))
        scope: dict[str, Any] = {"__name__": "torchship_wrapped"}
        # exporters count the inputs by the arguments of forward
        exec(f"def forward(self, {names}):\n    return self.run(self.flat, ({names},))", scope)  # noqa: S102  # our own names
        self.forward = MethodType(scope["forward"], self)

    @property
    def inner(self) -> torch.nn.Module:
        """The user's own module."""
        found = getattr(self.flat, "inner", self.flat)
        return found if isinstance(found, torch.nn.Module) else self.flat


class KeepFloat(torch.nn.Module):
    """Runs one submodule in float32 inside a narrower model, and hands back what the others expect."""

    def __init__(self, inner: torch.nn.Module, *, device: str, back: torch.dtype | None) -> None:
        super().__init__()
        self.inner, self.device, self.back = inner, device, back

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _each((args, kwargs), torch.float32)
        if self.back is not None:
            return _each(self.inner(*args, **kwargs), self.back)
        with torch.autocast(self.device, enabled=False):
            return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What others read from the submodule, as attention reads the weight of its output layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def in_precision(
    model: Model, precision: str, *, mode: str = "cast", device: str = "cpu", options: Options = {}
) -> Model:
    """`model` in fp16 or bf16: `autocast` lets each operator choose, `cast` narrows weights and tensors throughout.

    Submodules that `keep` and `modules` of the options spare stay in fp32. Raises BadConfig for an unknown word.
    """
    if precision not in DTYPES or mode not in ("autocast", "cast"):
        raise BadConfig(
            f"precision {precision!r} by {mode!r} is unknown", hint="use fp16, bf16 or fp32, by autocast or cast"
        )
    keep = paths.rules(options, narrow=(precision,), key="keep", module=model.module)
    dtype = DTYPES[precision]
    if dtype == torch.float32:
        return model
    flat = copy.deepcopy(model.module)
    outputs = [to_torch_dtype(spec.dtype) for spec in model.signature.outputs]
    cast = mode == "cast"
    keep_float(flat, keep, device=device, narrow=dtype if cast else None)
    if cast:
        narrow_inputs(flat, dtype)

    def run(flat: torch.nn.Module, tensors: TorchTensors) -> TorchTensors:
        if cast:
            answers = flat(*(_to(tensor, dtype) for tensor in tensors))
        else:
            with torch.autocast(device, dtype=dtype):
                answers = flat(*tensors)
        return tuple(answer.to(wanted) for answer, wanted in zip(answers, outputs, strict=True))

    return _wrapped(model, flat, run)


def narrow_inputs(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let every layer that has weights of its own take what it is given in their dtype, but for what stays in float32:
    a model may make float32 tensors itself, as from pixels, or as positions."""
    if isinstance(module, KeepFloat):
        return
    if any(weight.dtype == dtype for weight in module.parameters(recurse=False)):
        module.register_forward_pre_hook(lambda _, args, kwargs: _each((args, kwargs), dtype), with_kwargs=True)
    for child in module.children():
        narrow_inputs(child, dtype)


def channels_last(model: Model) -> Model:
    """`model` with the weights and inputs of two- and three-dimensional convolutions in channels-last memory."""
    flat = copy.deepcopy(model.module)
    for tensor in (*flat.parameters(), *flat.buffers()):
        if not tensor.is_contiguous(memory_format=_channels_last(tensor)):
            tensor.data = tensor.data.contiguous(memory_format=_channels_last(tensor))

    def run(flat: torch.nn.Module, tensors: TorchTensors) -> TorchTensors:
        answers = flat(*(t.contiguous(memory_format=_channels_last(t)) for t in tensors))
        return tuple(answer.contiguous() for answer in answers)

    return _wrapped(model, flat, run)


def _wrapped(model: Model, flat: torch.nn.Module, run: Callable[[Any, TorchTensors], TorchTensors]) -> Model:
    return replace(model, module=Wrapped(flat, inputs=len(model.signature.inputs), run=run).eval())


def _channels_last(tensor: torch.Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return formats.get(tensor.ndim, torch.contiguous_format)


def keep_float(flat: torch.nn.Module, rules: Rules, *, device: str, narrow: torch.dtype | None) -> None:
    """Put every topmost submodule of `flat` that is spared, with all inside it, into float32, in place, and cast all
    else to `narrow` where that is given. What is spared keeps its own weights: a large one is none any more once it was
    cast.

    A list or table of modules is never called itself: what it holds is put into float32.
    """
    others = [path for path, _ in flat.named_modules() if path and not rules.spares(path)]
    whole = [
        path
        for path, module in flat.named_modules()
        if paths.user_path(path)
        and rules.spares(path)
        and not isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict)
        and not any(other.startswith(f"{path}.") for other in others)
    ]
    tops = [path for path in whole if not any(path.startswith(f"{other}.") for other in whole)]
    kept = {path: copy.deepcopy(flat.get_submodule(path)).float() for path in tops}
    if narrow is not None:
        flat.to(narrow)
    for path, module in kept.items():
        flat.set_submodule(path, KeepFloat(module, device=device, back=narrow))


def to_torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a wire dtype."""
    return to_torch(np.zeros(1, numpy_dtype(name))).dtype


def _to(tensor: Any, dtype: torch.dtype) -> Any:
    other = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype != dtype
    return tensor.to(dtype) if other else tensor


def _each(value: Any, dtype: torch.dtype) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: _to(leaf, dtype), value)
