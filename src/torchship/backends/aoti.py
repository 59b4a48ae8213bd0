"""AOTInductor: the exported program compiled ahead of time into a shared library."""

from __future__ import annotations

from pathlib import Path

from torchship.errors import BuildFailed, CorruptArtifact
from torchship.hardware import Hardware
from torchship.lowering import program, torch_stage
from torchship.lowering.torch_stage import prepare
from torchship.model import Model
from torchship.plugins import needs
from torchship.recipe import Options, Recipe
from torchship.stage import Stage
from torchship.tensors import Signature

KIND = "native"
COMPILES = True  # takes from half a minute upwards
PACKAGES = ("torch",)
probe = needs("torch", compiler_of="AOTInductor")
OPTIONS = torch_stage.OPTIONS
FILE = "model.pt2"


def propose(model: Model, *, hardware: Hardware) -> list[Recipe]:
    """bf16 where the processor has it, fp16 on a GPU, then fp32."""
    layout: Options = {"channels_last": True} if torch_stage.takes_pictures(model) else {}
    wishes: list[Options] = []
    if hardware.gpus:
        wishes.append({"device": "cuda", "precision": "fp16", **layout})
    if hardware.has_bf16:
        wishes.append({"precision": "bf16", "mode": "cast", **layout})
    wishes.append({"precision": "fp32"})
    return [Recipe("aoti", wish) for wish in wishes]


def build(model: Model, *, options: Options, out: Path) -> None:
    """Compile to `model.pt2`. Options: device, precision, mode, channels_last, keep (see `lowering.torch_stage`).

    Raises BuildFailed or BadConfig.
    """
    import torch
    import torch._inductor

    exported = program.export(torch_stage.shaped(model, options), device=torch_stage.device_of(options))
    program.straighten(exported.graph_module)
    with program.as_error(BuildFailed, "AOTInductor cannot compile this model"), torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(out / FILE), inductor_configs={"freezing": True}
        )


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Load the library. Raises CorruptArtifact or Unavailable."""
    import torch
    import torch._inductor

    device = torch_stage.device_of(options, device=device)
    prepare(device=device, threads=threads, tf32=options.get("precision") == "tf32")
    with program.as_error(CorruptArtifact, f"{FILE} cannot be loaded"):
        body = torch._inductor.aoti_load_package(str(path / FILE))
    # the library checks nothing: a wrong shape or dtype would be answered with garbage
    return torch_stage.staged(body, signature=signature, device=device, check=True)
