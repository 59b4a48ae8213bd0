"""TorchScript: the traced and frozen module, for programs that still load it."""

from __future__ import annotations

import warnings
from pathlib import Path

from torchship.errors import BuildFailed
from torchship.hardware import Hardware
from torchship.lowering import program, script, torch_stage
from torchship.lowering.torch_stage import prepare
from torchship.model import Model
from torchship.plugins import needs
from torchship.recipe import Options, Recipe
from torchship.stage import Stage
from torchship.tensors import Signature

KIND = "native"  # a program of its own: TorchScript can read and write files
RARELY = True  # wins on a processor: there other quick engines have their turn before it
REPLAYS = True  # takes as a script what eager cannot export: no news about the model
PACKAGES = ("torch",)
probe = needs("torch")
OPTIONS = torch_stage.OPTIONS
FILE = "script.ts"


def propose(model: Model, *, hardware: Hardware) -> list[Recipe]:
    """In half precision on a GPU, pictures channels-last; and plain."""
    layout: Options = {"channels_last": True} if torch_stage.takes_pictures(model) else {}
    gpu: Options = {"device": "cuda", "precision": "fp16", **layout}
    wishes: list[Options] = [gpu, {}] if hardware.gpus else [{}]
    return [Recipe("torchscript", wish) for wish in wishes]


def build(model: Model, *, options: Options, out: Path) -> None:
    """Trace (or script, where the data decides the path) and freeze. Options: device, precision, mode, channels_last,
    keep (see `lowering.torch_stage`). Raises BuildFailed or BadConfig.
    """
    import torch

    shaped = torch_stage.shaped(model, options)
    with (
        program.as_error(BuildFailed, "TorchScript cannot take this model"),
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        one_path = script.exports(shaped) or script.traceable(shaped)
        made = script.scripted(shaped, traced=one_path, device=torch_stage.device_of(options))
        # optimize_for_inference would be faster still, but what it saves cannot be loaded again
        torch.jit.freeze(made.eval()).save(str(out / FILE))


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Load the script. Raises UnsafeArtifact, CorruptArtifact or Unavailable."""
    device = torch_stage.device_of(options, device=device)
    prepare(device=device, threads=threads, tf32=options.get("precision") == "tf32")
    return torch_stage.staged(script.load(path / FILE, device=device), signature=signature, device=device)
