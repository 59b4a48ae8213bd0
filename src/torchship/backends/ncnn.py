"""ncnn: a small runtime for the processors of boards and phones, a row at a time; opens without torch."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from torchship.errors import BuildFailed, CorruptArtifact, StageFailed, Unavailable
from torchship.hardware import Hardware, cores
from torchship.model import Model
from torchship.plugins import missing, needs
from torchship.recipe import Options, Recipe, choice
from torchship.stage import EngineStage, Stage
from torchship.tensors import Array, Signature, Tensors, TensorSpec

KIND = "data"
RARELY = True  # wins on a processor where memory matters: elsewhere others have their turn before it
PACKAGES = ("ncnn", "pnnx", "torch")
probe = needs("ncnn", pip="ncnn pnnx")
OPTIONS = ("precision",)
FILE = "model.ncnn"  # .param and .bin
_PRECISIONS = ("fp32", "fp16")
_TIMEOUT = 300.0  # seconds that pnnx may take
_MOST_AXES = 4  # of a row: ncnn's tensors have width, height, depth and channels


def propose(model: Model, *, hardware: Hardware) -> list[Recipe]:
    """fp32 and fp16, for models whose rows are FP32 tensors of fixed shapes."""
    if why_not(model.signature) or missing("pnnx"):
        return []
    return [Recipe("ncnn", {"precision": precision}) for precision in _PRECISIONS]


def why_not(signature: Signature) -> str:
    """Why ncnn cannot run a model of this signature; nothing when it may."""
    if not signature.batched:
        return "it runs a row at a time, and this model has no rows"
    for spec in (*signature.inputs, *signature.outputs):
        axes = spec.shape[1:]
        fixed = all(isinstance(axis, int) and axis > 0 for axis in axes)
        if spec.dtype != "FP32" or not fixed or not 1 <= len(axes) <= _MOST_AXES:
            return f"it takes and gives FP32 rows of one to {_MOST_AXES} fixed axes, and {spec.name!r} is {spec}"
    return ""


def build(model: Model, *, options: Options, out: Path) -> None:
    """Trace one row, and have pnnx write `model.ncnn.param` and `.bin`. Options: precision fp32 | fp16 (weights in
    half; where the processor computes in half, the rest too). Raises BuildFailed or BadConfig.
    """
    import torch

    precision = choice(options, "precision", _PRECISIONS, of="ncnn")
    if why := why_not(model.signature):
        raise BuildFailed(f"ncnn cannot take this model: {why}", hint="use onnxruntime")
    if absent := missing("pnnx"):
        raise BuildFailed(f"ncnn models are made by pnnx: {absent}")
    import pnnx

    row = tuple(tensor[:1] for tensor in model.torch_inputs(model.examples[0]))
    shapes = ",".join(f"[{','.join(map(str, tensor.shape))}]f32" for tensor in row)
    with TemporaryDirectory(prefix="torchship-pnnx-") as place:
        with torch.no_grad():
            try:
                trace: Any = torch.jit.trace
                trace(model.module, row, check_trace=False).save(f"{place}/model.pt")
            except Exception as fault:
                raise BuildFailed(f"ncnn needs a trace of this model: {str(fault).splitlines()[0][:200]}") from fault
        words = [pnnx.EXEC_PATH, "model.pt", f"inputshape={shapes}", f"fp16={int(precision == 'fp16')}"]
        try:
            done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        except (OSError, subprocess.TimeoutExpired) as fault:
            raise BuildFailed(f"pnnx does not run: {fault}") from fault
        for suffix in (".param", ".bin"):
            made = Path(place, FILE + suffix)
            if not made.is_file():
                last = [*done.stderr.splitlines(), f"exit code {done.returncode}"][-1][:200]
                raise BuildFailed(f"pnnx cannot convert this model: {last}", hint="use onnxruntime")
            (out / made.name).write_bytes(made.read_bytes())
    try:
        _load(out, {"precision": precision}, threads=1)
    except CorruptArtifact as fault:  # it writes operators down that ncnn does not have
        raise BuildFailed(f"ncnn lacks an operator of this model: {fault}", hint="use onnxruntime") from fault


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Load the network. Raises Unavailable for another device than the processor, CorruptArtifact."""
    if device != "cpu":
        raise Unavailable(f"ncnn runs on the processor here, not on {device}")
    import ncnn

    net = _load(path, options, threads=threads)
    names = [spec.name for spec in signature.inputs]
    shapes = [_row(spec) for spec in signature.outputs]

    def run(tensors: Tensors) -> Sequence[Array]:
        columns = [np.ascontiguousarray(tensors[name]) for name in names]
        count = len(columns[0])
        found = [np.empty((count, *shape), np.float32) for shape in shapes]
        for row in range(count):
            extractor = net.create_extractor()
            for place, column in enumerate(columns):
                extractor.input(f"in{place}", ncnn.Mat(column[row]).clone())
            for place, outputs in enumerate(found):
                code, made = extractor.extract(f"out{place}")
                if code:
                    raise StageFailed(f"ncnn cannot compute output {place}: code {code}")
                outputs[row] = np.asarray(made).reshape(shapes[place])
        return found

    return EngineStage(run, signature=signature)


def _row(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(axis for axis in spec.shape[1:] if isinstance(axis, int))


def _load(path: Path, options: Options, *, threads: int) -> Any:
    """The network, an `ncnn.Net`."""
    import ncnn

    net = ncnn.Net()
    half = options.get("precision") == "fp16"
    net.opt.num_threads = threads or cores()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = half
    for load, suffix in ((net.load_param, ".param"), (net.load_model, ".bin")):
        if load(str(path / FILE) + suffix):
            raise CorruptArtifact(f"{FILE}{suffix} cannot be opened by ncnn {ncnn.__version__}")
    return net
