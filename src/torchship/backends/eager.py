"""Plain torch, not compiled: the reference that every other backend is measured against."""

from __future__ import annotations

from pathlib import Path

from torchship.errors import BuildFailed, NotFound
from torchship.hardware import Hardware
from torchship.lowering import program, script, torch_stage
from torchship.lowering.torch_stage import prepare
from torchship.model import Model
from torchship.plugins import needs
from torchship.recipe import Options, Recipe
from torchship.stage import Stage
from torchship.tensors import Signature

BASELINE = True  # what all else is measured against
PLAIN: tuple[str, ...] = ()  # with no more options than these it is the module as it is
KIND = "data"
TAKES = ("fuse", "quantize")  # transforms that it gains from
PACKAGES = ("torch",)
probe = needs("torch")
OPTIONS = (*torch_stage.OPTIONS, "graphs")
SCRIPT = "script.ts"


def propose(model: Model, *, hardware: Hardware) -> list[Recipe]:
    """The reference itself; then what helps without a compiler: layout and precision; half precision on a GPU."""
    layout: Options = {"channels_last": True} if torch_stage.takes_pictures(model) else {}
    wishes: list[Options] = [{}]
    if hardware.gpus:
        gpu: Options = {"device": "cuda"}
        half = gpu | {"precision": "fp16"} | layout
        wishes += [gpu, half | {"graphs": True}, half, gpu | {"precision": "tf32"}]
    if hardware.has_bf16:
        wishes.append({"precision": "bf16", **layout})
    elif layout:
        wishes.append(layout)
    return [Recipe("eager", wish) for wish in wishes]


def build(model: Model, *, options: Options, out: Path) -> None:
    """Save the exported program; a module that `torch.export` cannot take is saved as TorchScript.

    Options: device, precision, mode, channels_last, keep (see `lowering.torch_stage`); `graphs` folds batch norms and
    replays CUDA graphs on a card. Raises BuildFailed with both reasons, or BadConfig.
    """
    shaped = torch_stage.shaped(torch_stage.folded(model) if options.get("graphs") else model, options)
    try:
        program.save(program.export(shaped, device=torch_stage.device_of(options)), out)
    except BuildFailed as refusal:
        (out / program.PROGRAM).unlink(missing_ok=True)
        try:
            script.scripted(shaped, traced=script.traceable(shaped)).save(str(out / SCRIPT))
        except Exception as fault:
            raise BuildFailed(
                f"{refusal}; torch.jit.script: {program.one_line(fault, limit=200)}", hint=refusal.hint
            ) from refusal


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Load the program as plain data. Raises UnsafeArtifact, CorruptArtifact, NotFound or Unavailable."""
    device = torch_stage.device_of(options, device=device)
    prepare(device=device, threads=threads, tf32=options.get("precision") == "tf32", tune=signature.fixed)
    tables: dict[int, int] = {}
    if (path / program.PROGRAM).exists():
        module = program.load(path)
        tables = program.table_sizes(module)
    elif (path / SCRIPT).exists():
        module = script.load(path / SCRIPT)
    else:
        raise NotFound(f"{path} holds neither {program.PROGRAM} nor {SCRIPT}")
    graphs = bool(options.get("graphs"))
    return torch_stage.staged(module.to(device), signature=signature, device=device, graphs=graphs, tables=tables)
