"""A Model as TorchScript: traced where one path is all there is, scripted where the data decides."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

from torchship.errors import BuildFailed
from torchship.lowering import program
from torchship.model import Model

if TYPE_CHECKING:
    import torch


def has_one_path(model: Model) -> bool:
    """Whether `torch.export` takes it, and so no branch depends on data or lengths: only then is a trace the model."""
    try:
        program.export(model)
    except BuildFailed:
        return False
    return True


def scripted(model: Model) -> torch.jit.ScriptModule:
    """The user's module scripted with its control flow, inside the traced flat module of the model.

    Raises whatever `torch.jit.script` raises.
    """
    import torch

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; it is what is left for such modules
        shell = holding_script(model)
        if isinstance(shell, torch.jit.ScriptModule):
            return shell
        inputs = model.torch_inputs(model.examples[0])
        return torch.jit.trace(shell, inputs, check_trace=False)  # type: ignore[no-any-return,no-untyped-call]


def holding_script(model: Model) -> Any:
    """A copy of the flat module that holds the user's module as a script; the script itself where they are one."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat = model.module.eval()
        inner = getattr(flat, "inner", None)
        if not isinstance(inner, torch.nn.Module):
            return torch.jit.script(flat)
        return copy.deepcopy(flat, {id(inner): torch.jit.script(inner)}).eval()
