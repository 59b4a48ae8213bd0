"""The same model in another precision or memory layout: wrappers around its flat module that export like any other.

A wrapper keeps the flat module at `.flat` and the user's own module at `.inner`; tensors keep the dtypes of the
signature at the edge, whatever happens inside.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import torch

from torchship.errors import BadConfig
from torchship.lowering import paths
from torchship.lowering.paths import Rules
from torchship.model import Model, to_torch
from torchship.tensors import numpy_dtype

_NOTHING = Rules(())
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Wrapped(torch.nn.Module):
    """`flat` with something done to its tensors before and after."""

    def __init__(self, flat: torch.nn.Module, *, inputs: int) -> None:
        super().__init__()
        self.flat = flat
        names = ", ".join(f"t{i}" for i in range(inputs))
        scope: dict[str, Any] = {"__name__": "torchship_wrapped"}
        # exporters count the inputs by the arguments of forward
        exec(f"def forward(self, {names}):\n    return self.run(({names},))", scope)  # noqa: S102  # our own names
        self.forward = MethodType(scope["forward"], self)

    @property
    def inner(self) -> torch.nn.Module:
        """The user's own module."""
        found = getattr(self.flat, "inner", self.flat)
        return found if isinstance(found, torch.nn.Module) else self.flat

    @property
    def notes(self) -> Any:
        """What capture noted about the module."""
        return getattr(self.flat, "notes", ())

    def run(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What forward does."""
        found: tuple[torch.Tensor, ...] = self.flat(*tensors)
        return found


class _Narrowed(Wrapped):
    """Runs in a narrower dtype: under autocast on `device`, or without one with all floating-point tensors cast."""

    def __init__(
        self, flat: torch.nn.Module, *, inputs: int, device: str, dtype: torch.dtype, outputs: Sequence[torch.dtype]
    ) -> None:
        super().__init__(flat, inputs=inputs)
        self.device, self.dtype, self.outputs = device, dtype, tuple(outputs)

    def run(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if self.device:
            with torch.autocast(self.device, dtype=self.dtype):
                answers = self.flat(*tensors)
        else:
            answers = self.flat(*(_to(tensor, self.dtype) for tensor in tensors))
        return tuple(answer.to(dtype) for answer, dtype in zip(answers, self.outputs, strict=True))


class _ChannelsLast(Wrapped):
    """Pictures and volumes enter in channels-last memory, which then flows through the convolutions."""

    def run(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        given = (t.contiguous(memory_format=_channels_last(t)) for t in tensors)
        answers: tuple[torch.Tensor, ...] = self.flat(*given)
        return tuple(answer.contiguous() for answer in answers)


class KeepFloat(torch.nn.Module):
    """Runs one submodule in float32 inside a narrower model, and hands back what the others expect."""

    def __init__(self, inner: torch.nn.Module, *, device: str, back: torch.dtype | None) -> None:
        super().__init__()
        self.inner, self.device, self.back = inner, device, back

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = _each(args, lambda tensor: _to(tensor, torch.float32))
        named = _each(kwargs, lambda tensor: _to(tensor, torch.float32))
        off = torch.autocast(self.device, enabled=False) if self.back is None else contextlib.nullcontext()
        with off:
            answer = self.inner(*given, **named)
        back = self.back
        return answer if back is None else _each(answer, lambda tensor: _to(tensor, back))

    def __getattr__(self, name: str) -> Any:
        """What others read from the submodule, as attention reads the weight of its output layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def in_precision(model: Model, precision: str, *, mode: str, device: str = "cpu", keep: Rules = _NOTHING) -> Model:
    """`model` in fp16 or bf16: `autocast` lets each operator choose, `cast` narrows weights and tensors throughout.

    Submodules that `keep` spares stay in fp32. Raises BadConfig for an unknown word.
    """
    if precision not in DTYPES or mode not in ("autocast", "cast"):
        raise BadConfig(
            f"precision {precision!r} by {mode!r} is unknown", hint="use fp16, bf16 or fp32, by autocast or cast"
        )
    if precision == "fp32":
        return model
    dtype = DTYPES[precision]
    flat = copy.deepcopy(model.module)
    outputs = [to_torch_dtype(spec.dtype) for spec in model.signature.outputs]
    cast = mode == "cast"
    keep_float(flat.to(dtype) if cast else flat, keep, device=device, back=dtype if cast else None)
    settings: dict[str, Any] = {"inputs": len(model.signature.inputs), "dtype": dtype, "outputs": outputs}
    return replace(model, module=_Narrowed(flat, device="" if cast else device, **settings).eval())


def channels_last(model: Model) -> Model:
    """`model` with the weights and inputs of two- and three-dimensional convolutions in channels-last memory."""
    flat = copy.deepcopy(model.module)
    for tensor in (*flat.parameters(), *flat.buffers()):
        if not tensor.is_contiguous(memory_format=_channels_last(tensor)):
            tensor.data = tensor.data.contiguous(memory_format=_channels_last(tensor))
    return replace(model, module=_ChannelsLast(flat, inputs=len(model.signature.inputs)).eval())


def _channels_last(tensor: torch.Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return formats.get(tensor.ndim, torch.contiguous_format)


def keep_float(flat: torch.nn.Module, rules: Rules, *, device: str, back: torch.dtype | None) -> None:
    """Put every topmost submodule of `flat` that is spared, with all inside it, into float32, in place.

    A list or table of modules is never called itself: what it holds is put into float32.
    """
    narrow = [path for path, _ in flat.named_modules() if path and not rules.spares(path)]
    whole = [
        path
        for path, module in flat.named_modules()
        if paths.user_path(path)
        and rules.spares(path)
        and not isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict)
        and not any(other.startswith(f"{path}.") for other in narrow)
    ]
    for path in whole:
        if any(path.startswith(f"{other}.") for other in whole):
            continue
        parent, _, name = path.rpartition(".")
        owner = flat.get_submodule(parent)
        kept = KeepFloat(owner.get_submodule(name).float(), device=device, back=back)
        owner.register_module(name, kept)


def to_torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a wire dtype."""
    import numpy as np

    return to_torch(np.zeros(1, numpy_dtype(name))).dtype


def _to(tensor: Any, dtype: torch.dtype) -> Any:
    return tensor.to(dtype) if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else tensor


def _each(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    return torch.utils._pytree.tree_map(change, value)
