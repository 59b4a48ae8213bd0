"""TorchScript: the traced and frozen module, for programs that still load it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

from torchship.errors import BuildFailed
from torchship.hardware import Hardware
from torchship.lowering import program, script, torch_stage
from torchship.lowering.torch_stage import prepare
from torchship.model import Model
from torchship.plugins import missing
from torchship.recipe import Options, Recipe
from torchship.stage import Stage
from torchship.tensors import Signature

KIND = "native"  # a program of its own: TorchScript can read and write files
PACKAGES = ("torch",)
OPTIONS = torch_stage.OPTIONS
FILE = "script.ts"


def probe(*, hardware: Hardware) -> str:
    """Why it cannot run here, with the mend; empty when it can."""
    return missing("torch")


def propose(model: Model, *, hardware: Hardware) -> list[Recipe]:
    """Plain; and in half precision on a GPU."""
    gpu: Options = {"device": "cuda", "precision": "fp16"}
    wishes: list[Options] = [gpu, {}] if hardware.gpus else [{}]
    return [Recipe("torchscript", wish) for wish in wishes]


def build(model: Model, *, options: Options, out: Path) -> None:
    """Trace (or script, where the data decides the path) and freeze. Options: device, precision, mode, channels_last,
    keep (see `lowering.torch_stage`). Raises BuildFailed or BadConfig.
    """
    import torch

    device = torch_stage.device_of(options)
    shaped = torch_stage.shaped(model, options)
    # optimize_for_inference would be faster still, but what it saves cannot be loaded again
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            # a trace follows the path of its example, so it is only taken where there is just one
            flat = copy.deepcopy(shaped.module) if script.has_one_path(shaped) else script.holding_script(shaped)
            inputs = model.torch_inputs(model.examples[0], device=device)
            traced = torch.jit.trace(flat.eval().to(device), inputs, check_trace=False)  # type: ignore[no-untyped-call]
            torch.jit.freeze(traced.eval()).save(str(out / FILE))
        except Exception as fault:
            raise BuildFailed(f"TorchScript cannot take this model: {program.one_line(fault)}") from fault


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Load the script. Raises UnsafeArtifact, CorruptArtifact or Unavailable."""
    device = torch_stage.device_of(options, device=device)
    prepare(device=device, threads=threads, tf32=options.get("precision") == "tf32")
    return torch_stage.staged(script.load(path / FILE, device=device), signature=signature, device=device)
