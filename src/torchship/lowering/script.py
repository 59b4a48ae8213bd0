"""A Model as TorchScript: traced where one path is all there is, scripted where the data decides."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchship.errors import BuildFailed, CorruptArtifact
from torchship.lowering import program
from torchship.lowering.safety import refuse_code_in_script
from torchship.model import Model
from torchship.tensors import Free, Tensors

if TYPE_CHECKING:
    import torch


_OWN_CHECKS = str(Path("torch", "nn", "modules", "rnn.py"))


def exports(model: Model) -> bool:
    """Whether `torch.export` takes it."""
    try:
        program.export(model)
    except BuildFailed:
        return False
    return True


def traceable(model: Model) -> bool:
    """Whether Python takes no value and no length out of a tensor: traces of other lengths are the same, step by step,
    and the tracer warns of nothing.

    Recurrent layers with a free length are such models: `torch.export` unrolls them. Their own checks of their inputs'
    widths count for nothing.
    """
    if any(getattr(module, "decided", ()) for module in model.module.modules()):
        return False
    calls = _lengths(model)
    return calls is not None and len({_steps(model, call) or id(call) for call in calls}) == 1


def _lengths(model: Model) -> list[Tensors] | None:
    """Examples with two lengths of every free axis; None where there are none."""
    first, calls = model.examples[0], list(model.examples)
    if model.signature.batched and model.signature.max_rows > 1:
        count = next(iter(first.values())).shape[0]
        calls.append({name: array.repeat(2, axis=0)[: count + 1] for name, array in first.items()})
    for spec in model.signature.inputs:
        for position, axis in enumerate(spec.shape):
            if isinstance(axis, Free) and len({call[spec.name].shape[position] for call in calls}) == 1:
                return None
    shapes = {tuple(array.shape for array in call.values()): call for call in reversed(calls)}
    return list(shapes.values())


def _steps(model: Model, call: Tensors) -> tuple[str, ...]:
    """The operators and constants of a trace; nothing where the tracer fails, or warns."""
    import torch

    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        try:
            traced: Any = torch.jit.trace(model.module.eval(), model.torch_inputs(call), check_trace=False)  # type: ignore[no-untyped-call]
        except Exception:  # whatever stops it
            return ()
    warned = [warning for warning in seen if warning.category.__name__ == "TracerWarning"]
    if not all(warning.filename.endswith(_OWN_CHECKS) for warning in warned):
        return ()
    return tuple(map(_step, traced.inlined_graph.nodes()))


def _step(node: Any) -> str:
    if node.kind() != "prim::Constant":
        return str(node.kind())
    value = node.output().toIValue()
    return f"{value.shape} {value.dtype}" if hasattr(value, "shape") else repr(value)


def scripted(model: Model, *, traced: bool, device: str = "cpu") -> torch.jit.ScriptModule:
    """The model as a script on `device`: traced as a whole where it has one path, as only then a trace is the model;
    else the user's module is scripted with its control flow, and what is around it traced.

    Raises whatever torch raises.
    """
    import torch

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; it is what is left for such modules
        flat: Any = model.module.eval()
        inner = getattr(flat, "inner", None)
        if traced:
            shell = flat if device == "cpu" else copy.deepcopy(flat)
        elif isinstance(inner, torch.nn.Module):
            shell = copy.deepcopy(flat, {id(inner): torch.jit.script(inner)}).eval()
        else:
            return torch.jit.script(flat)  # type: ignore[no-any-return]
        inputs = model.torch_inputs(model.examples[0], device=device)
        return torch.jit.trace(shell.to(device), inputs, check_trace=False)  # type: ignore[no-any-return,no-untyped-call]


def load(path: Path, *, device: str = "cpu") -> torch.nn.Module:
    """The TorchScript in a file. Raises UnsafeArtifact, CorruptArtifact or Unavailable."""
    import torch

    refuse_code_in_script(path)
    program.register_operators(path)
    with warnings.catch_warnings(), program.as_error(CorruptArtifact, f"{path.name} cannot be loaded"):
        warnings.simplefilter("ignore")
        return torch.jit.load(str(path), map_location=device)  # type: ignore[no-any-return,no-untyped-call]
