"""`torch.compile` of the exported program, with frozen weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchship.errors import BadConfig
from torchship.hardware import Hardware
from torchship.lowering import program
from torchship.lowering.needs import missing
from torchship.lowering.torch_stage import TorchStage, blank, prepare
from torchship.model import Model, to_torch
from torchship.recipe import Options, Recipe
from torchship.stage import Stage
from torchship.tensors import Signature

if TYPE_CHECKING:
    from collections.abc import Callable

KIND = "data"
PACKAGES = ("torch",)
_PRECISIONS = ("fp32", "bf16")


def probe(*, hardware: Hardware) -> str:
    """Why it cannot run here, with the mend; empty when it can."""
    import shutil

    if absent := missing("torch", pip="torchship[optimize]"):
        return absent
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler: apt-get install g++"
    return ""


def propose(model: Model, *, hardware: Hardware) -> list[Recipe]:
    """bf16 where the processor has it, then fp32."""
    fast = bool({"avx512_bf16", "amx_bf16"} & set(hardware.features))
    return [
        Recipe("inductor", {"precision": precision}) for precision in ("bf16", "fp32") if fast or precision == "fp32"
    ]


def build(model: Model, *, options: Options, out: Path) -> None:
    """Save the exported program: it is compiled where it is opened. Raises BuildFailed or BadConfig."""
    _precision(options)
    program.save(program.export(model), out)


def _precision(options: Options) -> str:
    precision = str(options.get("precision", "fp32"))
    if precision not in _PRECISIONS:
        raise BadConfig(f"inductor: precision {precision!r} is unknown", hint=f"use one of {', '.join(_PRECISIONS)}")
    return precision


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Compile, and run once for one row and once for several, so that no request waits for the compiler.

    Raises UnsafeArtifact, CorruptArtifact or Unavailable.
    """
    import torch
    import torch._inductor.config

    prepare(device=device, threads=threads)
    torch._inductor.config.freezing = True
    module = program.load(path).to(device)
    half = _precision(options) == "bf16"
    compiled = torch.compile(module)

    def body(*inputs: torch.Tensor) -> Any:
        if not half:
            return compiled(*inputs)
        with torch.autocast(device.partition(":")[0], dtype=torch.bfloat16):
            return compiled(*inputs)

    _warm(body, signature, device)
    return TorchStage(body, signature=signature, device=device)


def _warm(body: Callable[..., Any], signature: Signature, device: str) -> None:
    import torch

    for rows in dict.fromkeys((1, min(3, signature.max_rows))):
        tensors = blank(signature, rows=rows)
        inputs = [to_torch(tensors[spec.name]).to(device) for spec in signature.inputs]
        if rows > 1:
            for tensor, spec in zip(inputs, signature.inputs, strict=True):
                if spec.shape and not isinstance(spec.shape[0], int):
                    torch._dynamo.mark_dynamic(tensor, 0)
        with torch.inference_mode():
            body(*inputs)
