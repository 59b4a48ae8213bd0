"""ExecuTorch: a `.pte` file for phones and small boards, through XNNPACK, in fp32 or int8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchship.errors import BuildFailed, CorruptArtifact, Unavailable
from torchship.hardware import Hardware
from torchship.lowering import paths, program
from torchship.lowering.torch_stage import prepare, staged
from torchship.model import Model
from torchship.plugins import needs
from torchship.recipe import Options, Recipe, choice
from torchship.stage import Stage
from torchship.tensors import Signature

if TYPE_CHECKING:
    from torch.export import ExportedProgram

KIND = "data"
COMPILES = True  # takes from half a minute upwards
PACKAGES = ("executorch", "torch")
probe = needs("torch executorch")
OPTIONS = ("precision", "exclude", "modules")
FILE = "model.pte"
_CEILING = 128  # memory is planned for the longest call, so unbounded axes get a modest bound


def propose(model: Model, *, hardware: Hardware) -> list[Recipe]:
    """int8 where there is data, then fp32."""
    recipes = [Recipe("executorch", {"precision": precision}) for precision in ("int8", "fp32")]
    return recipes if model.calibration else recipes[1:]


def build(model: Model, *, options: Options, out: Path) -> None:
    """Write `model.pte`. Options: precision fp32 | int8 (per channel); for int8 exclude and modules (what stays in
    float, see `paths.rules`). Raises BuildFailed or BadConfig.
    """
    precision = choice(options, "precision", ("fp32", "int8"), of="executorch")
    if precision == "fp32":
        paths.refuse_any(options, what="executorch in fp32")
    rules = paths.rules(options, narrow=("int8",), module=model.module)
    exported = program.export(model, ceiling=_CEILING)
    with program.as_error(BuildFailed, "executorch cannot lower this model"), program.quiet(), _any_rows():
        ready = _int8(exported, model, rules) if precision == "int8" else exported
        free = {str(dim) for shape in model.dynamic_shapes() for dim in shape.values()}
        data = _lowered(ready, reshapes=len(free) < 2)
    (out / FILE).write_bytes(data)


@contextmanager
def _any_rows() -> Iterator[None]:
    """oneDNN and NNPACK ask whether there are 16 rows before they take a convolution; torch writes the answer of the
    example into the program, and memory is planned for 15."""
    import torch.backends.mkldnn
    import torch.backends.nnpack

    with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        yield


def _lowered(exported: ExportedProgram, *, reshapes: bool) -> bytes:
    """`reshapes`: whether XNNPACK may do them; it fails where more than one axis is free."""
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    left_out = () if reshapes else ("UnsqueezeCopyConfig", "ViewCopyConfig")
    configs = [config for config in ALL_PARTITIONER_CONFIGS if config.__name__ not in left_out]
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner(configs=configs)])
    return bytes(lowered.to_executorch().buffer)


def _int8(exported: ExportedProgram, model: Model, rules: paths.Rules) -> ExportedProgram:
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from torchship.lowering import surgery

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    quantizer.set_filter_function(lambda node: not rules.spares(surgery.place_of(node)))
    prepared = prepare_pt2e(exported.module(), quantizer)
    with torch.no_grad():
        for batch in model.calibration or model.examples:
            prepared(*model.torch_inputs(batch))
    shapes = model.dynamic_shapes(ceiling=_CEILING)
    return torch.export.export(
        convert_pt2e(prepared), model.torch_inputs(model.examples[0]), dynamic_shapes=shapes, strict=False
    )


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Load the program into ExecuTorch's own runtime. Raises Unavailable for another device, CorruptArtifact."""
    if device != "cpu":
        raise Unavailable(f"executorch runs on the processor here, not on {device}")
    from executorch.runtime import Runtime

    prepare(device="cpu", threads=threads)
    with program.as_error(CorruptArtifact, f"{FILE} cannot be loaded"):
        loaded = Runtime.get().load_program(path / FILE)
        method = loaded.load_method("forward")

    def body(*inputs: Any) -> tuple[Any, ...]:
        # the runtime reuses its output memory, and needs plain contiguous inputs
        return tuple(answer.clone() for answer in method.execute([tensor.contiguous() for tensor in inputs]))

    return staged(body, signature=signature, check=True)
