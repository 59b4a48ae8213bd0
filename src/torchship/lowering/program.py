"""A Model as an exported program (`torch.export`): made, saved, and loaded again without running its file's code."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING

from torchship.errors import BuildFailed, CorruptArtifact
from torchship.lowering import operators
from torchship.lowering.safety import refuse_code_in_program
from torchship.model import Model

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

PROGRAM = "program.pt2"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def one_line(fault: BaseException, *, limit: int = 400) -> str:
    """Type and message of an exception on one line of at most `limit` characters."""
    text = f"{type(fault).__name__}: {' '.join(_COLOUR.sub('', str(fault)).split())}"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def export(model: Model, *, device: str = "cpu", ceiling: int = 4096) -> ExportedProgram:
    """`torch.export` on `device` with a Dim for every free axis (at most `ceiling` where unbounded).

    The example must have two rows or more: torch specialises on one. Raises BuildFailed with torch's reason.
    """
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise BuildFailed(f"torch sees no device {device!r}", hint="check nvidia-smi and that torch is a CUDA build")
    module = model.module.eval() if device == "cpu" else copy.deepcopy(model.module).eval().to(device)
    inputs = model.torch_inputs(model.examples[0], device=device)
    try:
        with torch.no_grad():
            return torch.export.export(
                module, inputs, dynamic_shapes=model.dynamic_shapes(ceiling=ceiling), strict=False
            )
    except Exception as fault:
        raise BuildFailed(
            f"torch.export cannot capture this model: {one_line(fault)}", hint="torchship doctor says where and why"
        ) from fault


def save(program: ExportedProgram, out: Path) -> None:
    """Write `program` into the folder `out`. Raises BuildFailed when torch cannot write it as plain data."""
    import torch

    try:
        torch.export.save(program, out / PROGRAM)
        refuse_code_in_program(out / PROGRAM)
    except Exception as fault:
        raise BuildFailed(f"the exported program cannot be saved as plain data: {one_line(fault)}") from fault


def load(folder: Path) -> torch.nn.Module:
    """The module of the program in `folder`, on the device it was exported on.

    Raises CorruptArtifact, UnsafeArtifact or Unavailable.
    """
    import torch

    refuse_code_in_program(folder / PROGRAM)
    import torch.ao.quantization.fx._decomposed  # registers the operators of quantized programs

    operators.register(folder / PROGRAM)
    try:
        return torch.export.load(folder / PROGRAM).module(check_guards=False)
    except Exception as fault:
        raise CorruptArtifact(
            f"{PROGRAM} cannot be loaded by torch {torch.__version__}: {one_line(fault)}",
            hint="open it with the torch version that the manifest names",
        ) from fault
