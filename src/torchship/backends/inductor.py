"""`torch.compile` of the exported program, with frozen weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchship.hardware import Hardware
from torchship.lowering import program, torch_stage
from torchship.lowering.torch_stage import blank, prepare
from torchship.model import Model, to_torch
from torchship.plugins import needs
from torchship.recipe import Options, Recipe, Step, choice
from torchship.stage import Stage
from torchship.tensors import Signature

if TYPE_CHECKING:
    import torch

KIND = "data"
PARTS = ("cpu", "cuda")  # where it runs parts of a model that stays Python
TRIED = 3  # in this order among the backends: how often it wins
TAKES = ("quantize",)
# where there is data; a module called twice, as torchvision's ReLUs are, stops the quantizer
CALIBRATED = (Step("unshare"), Step("quantize", {"scheme": "static"}))
COMPILES = True  # takes from half a minute upwards
PACKAGES = ("torch",)
probe = needs("torch", compiler_of="torch.compile")
OPTIONS = (*torch_stage.OPTIONS, "compile_mode")
_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")


def propose(model: Model, *, hardware: Hardware) -> list[Recipe]:
    """bf16 where the processor has it, then fp32. On a GPU `kernels` compiles once, not at each opening."""
    layout: Options = {"channels_last": True} if torch_stage.takes_pictures(model) else {}
    wishes: list[Options] = []
    if hardware.has_bf16:
        # under autocast a compiled encoder was no faster alone, and far slower at batch 8
        wishes.append({"precision": "bf16", "mode": "cast", **layout})
    wishes.append({"precision": "fp32"})
    return [Recipe("inductor", wish) for wish in wishes]


def build(model: Model, *, options: Options, out: Path) -> None:
    """Save the exported program: it is compiled where it is opened.

    Options: device, precision, mode, channels_last, keep (see `lowering.torch_stage`), compile_mode (default |
    reduce-overhead, which is CUDA graphs | max-autotune-no-cudagraphs). Raises BuildFailed or BadConfig.
    """
    choice(options, "compile_mode", _COMPILE_MODES, of="inductor")
    program.save(program.export(torch_stage.shaped(model, options), device=torch_stage.device_of(options)), out)


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Compile, and run once for one row and once for several, so that no request waits for the compiler.

    Raises UnsafeArtifact, CorruptArtifact or Unavailable.
    """
    import torch
    import torch._inductor.config

    device = torch_stage.device_of(options, device=device)
    prepare(device=device, threads=threads, tf32=options.get("precision") == "tf32")
    torch._inductor.config.freezing = True
    mode = choice(options, "compile_mode", _COMPILE_MODES, of="inductor")
    graphs = mode == "reduce-overhead" and device != "cpu"
    module = program.load(path)
    tables = program.table_sizes(module)
    compiled = torch.compile(program.straighten(module).to(device), mode=mode)

    def body(*inputs: torch.Tensor) -> Any:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return compiled(*inputs)

    _warm(body, signature, device, repeats=3 if graphs else 1)
    return torch_stage.staged(body, signature=signature, device=device, tables=tables)


def _warm(body: Callable[..., Any], signature: Signature, device: str, *, repeats: int) -> None:
    """One row is compiled by itself; a second number of rows makes the code for any number, and any length."""
    import torch

    for rows in dict.fromkeys((1, min(3, signature.max_rows))):
        tensors = blank(signature, rows=rows)
        inputs = [to_torch(tensors[spec.name]).to(device) for spec in signature.inputs]
        for tensor, spec in zip(inputs, signature.inputs, strict=True):
            for position, axis in enumerate(spec.shape):
                if not isinstance(axis, int) and tensor.shape[position] > 1 and (position or rows > 1):
                    torch._dynamo.maybe_mark_dynamic(tensor, position)
        with torch.inference_mode():
            for _ in range(repeats):
                body(*inputs)
