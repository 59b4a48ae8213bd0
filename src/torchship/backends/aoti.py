"""AOTInductor: the exported program compiled ahead of time into a shared library."""

from __future__ import annotations

import tempfile
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
TRIED_OUT = "torchship.backends.aoti:run_tiny"  # on a card, before any recipe: its libraries may end who loads them


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


def run_tiny(device: str) -> None:
    """Compile, load and run one small layer on `device`, in a child of its own; raises where that fails."""
    import torch
    import torch._inductor

    layer, given = torch.nn.Linear(4, 4).eval().to(device), torch.ones(2, 4, device=device)
    with tempfile.TemporaryDirectory(prefix="torchship-aoti-") as folder, torch.no_grad():
        made = torch._inductor.aoti_compile_and_package(
            torch.export.export(layer, (given,)), package_path=str(Path(folder) / FILE)
        )
        torch.testing.assert_close(torch._inductor.aoti_load_package(made)(given), layer(given), rtol=1e-2, atol=1e-2)
