"""TensorRT, or TensorRT-RTX: an engine built from ONNX with its precision written into the graph.

Engines are strongly typed: fp16 is cast in the graph and int8 are explicit quantize nodes (signed, symmetric), since
TensorRT 11 knows no precision flags. An engine can be built where the libraries are; it runs where a card allows.
"""

from __future__ import annotations

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torchship.errors import BuildFailed, Unavailable, WrongMachine
from torchship.hardware import Hardware
from torchship.lowering import torch_stage
from torchship.lowering.torch_stage import prepare
from torchship.model import Model
from torchship.plugins import missing
from torchship.recipe import Options, Recipe, choice
from torchship.stage import Stage
from torchship.tensors import Axis, Free, Signature, TensorSpec

KIND = "native"
TRIED = 2  # in this order among the backends: how often it wins
PACKAGES = ("tensorrt", "tensorrt-rtx-cu13-libs", "torch")
OPTIONS = ("precision", "device", "workspace", "keep", "modules", "exclude", "range", "percentile", "bias_correction",
           "ops", "per_channel")  # fmt: skip
FILE = "model.plan"
LAYERS = "layers.json"
_MODULES = ("tensorrt", "tensorrt_rtx_bindings")
_PIP = "tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings"
_RTX_CARDS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_PRECISIONS = ("fp16", "fp32", "bf16", "int8")
_CEILING = 512


def probe(*, hardware: Hardware) -> str:
    """Why it cannot run here, with the mend; empty when it can. Building needs only the libraries."""
    found, refusal = _module(), ""
    for card in hardware.gpus[:1]:
        if card.capability not in _RTX_CARDS:
            refusal = f"TensorRT-RTX does not run on {card.name} (compute {card.capability})"
    if not found and refusal:
        return f"tensorrt is not installed: pip install tensorrt; {refusal}"
    if not found:
        return f"neither tensorrt nor TensorRT-RTX is installed: pip install {_PIP}"
    if not hardware.gpus:
        return "TensorRT runs on NVIDIA GPUs, and this machine shows none: engines can be built here, not run"
    if found == "tensorrt_rtx_bindings" and refusal:
        return f"{refusal}; it takes {' '.join(_RTX_CARDS)}"
    return missing("torch")


def propose(model: Model, *, hardware: Hardware) -> list[Recipe]:
    """fp16, int8 where there is data, fp32; nothing without a card."""
    wishes = ["fp16", *(["int8"] if model.calibration else []), "fp32"] if hardware.gpus else []
    return [Recipe("tensorrt", {"precision": precision, "device": "cuda"}) for precision in wishes]


def build(model: Model, *, options: Options, out: Path) -> None:
    """Write the engine `model.plan` and `layers.json`, which lists the layers of its network.

    Options: precision fp32 | fp16 | bf16 | int8, keep and modules for fp16 and bf16, those of `lowering.onnx_int8` for
    int8, and workspace (bytes it may use while it tries kernels). Raises BuildFailed or BadConfig.
    """
    from torchship.lowering import onnx_graph, onnx_int8, paths, variants

    precision = choice(options, "precision", _PRECISIONS, of="tensorrt")
    if not _module():
        raise BuildFailed("neither tensorrt nor TensorRT-RTX is installed", hint=f"pip install {_PIP}")
    with tempfile.TemporaryDirectory(prefix="torchship-tensorrt-") as folder:
        graph = Path(folder) / "model.onnx"
        if precision == "fp32":
            paths.refuse_any(options, what="tensorrt in fp32")
        elif precision != "int8":
            model = variants.in_precision(model, precision, options=options)
        onnx_graph.write(model, graph)
        if precision == "int8":
            onnx_int8.quantize(model, graph, options={"ops": "heavy", **options}, signed=True)
        plan, layers = _compiled(graph, model.signature, options)
    (out / FILE).write_bytes(plan)
    (out / LAYERS).write_text(json.dumps(layers, indent=1))


def _module() -> str:
    return next((name for name in _MODULES if find_spec(name)), "")


def _bindings() -> Any:
    import importlib

    name = _module()
    if not name:
        raise Unavailable("neither tensorrt nor TensorRT-RTX is installed", hint=f"pip install {_PIP}")
    return importlib.import_module(name)


def _compiled(graph: Path, signature: Signature, options: Options) -> tuple[bytes, list[dict[str, str]]]:
    trt = _bindings()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph.read_bytes()):
        faults = "; ".join(str(parser.get_error(i)) for i in range(min(parser.num_errors, 3)))
        raise BuildFailed(f"TensorRT cannot parse this graph: {' '.join(faults.split())[:400]}")
    config = builder.create_builder_config()
    if workspace := options.get("workspace"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(str(workspace)))
    profile = builder.create_optimization_profile()
    for spec in signature.inputs:
        if any(isinstance(axis, Free) for axis in spec.shape):
            profile.set_shape(spec.name, *(_extent(spec, signature, which) for which in ("least", "usual", "most")))
    config.add_optimization_profile(profile)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    listed = [
        {
            "name": layer.name,
            "type": str(layer.type).rpartition(".")[2],
            "dtype": str(layer.get_output(0).dtype).rpartition(".")[2] if layer.num_outputs else "",
        }
        for layer in layers
    ]
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildFailed("TensorRT found no engine for this graph", hint="try precision fp32, or fewer free axes")
    return bytes(plan), listed


def _extent(spec: TensorSpec, signature: Signature, which: str) -> tuple[int, ...]:
    def length(position: int, axis: Axis) -> int:
        if isinstance(axis, int):
            return axis
        rows = position == 0 and signature.batched
        most = signature.max_rows if rows else axis.max or max(_CEILING, axis.min)
        least = max(axis.min, 1)
        return {"least": least, "usual": max(least, min(most, 8 if rows else most // 2)), "most": most}[which]

    return tuple(length(position, axis) for position, axis in enumerate(spec.shape))


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Load the engine; torch holds its memory. Raises WrongMachine or Unavailable."""
    trt = _bindings()
    device = torch_stage.device_of({**options, "device": "cuda"}, device=device)
    prepare(device=device, threads=threads)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine((path / FILE).read_bytes())
    if engine is None:
        raise WrongMachine(
            f"{FILE} was built for another card or another TensorRT than {trt.__version__}", hint="optimize it here"
        )
    body = _Engine(engine, signature, device)
    return torch_stage.staged(body, signature=signature, device=device, check=True)


class _Engine:
    """One execution context; tensors stay on the card between input and output."""

    def __init__(self, engine: Any, signature: Signature, device: str) -> None:
        from torchship.lowering.variants import to_torch_dtype

        self._context = engine.create_execution_context()
        self._inputs = [(spec.name, to_torch_dtype(spec.dtype)) for spec in signature.inputs]
        # by their places: a name that an input has too is another one in the graph
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        outputs = [name for name in names if engine.get_tensor_mode(name).name == "OUTPUT"]
        self._outputs = [(n, to_torch_dtype(spec.dtype)) for n, spec in zip(outputs, signature.outputs, strict=True)]
        self._device = device

    def __call__(self, *tensors: Any) -> tuple[Any, ...]:
        import torch

        held = []
        for (name, dtype), tensor in zip(self._inputs, tensors, strict=True):
            ready = tensor.to(dtype).contiguous()
            held.append(ready)
            self._context.set_input_shape(name, tuple(ready.shape))
            self._context.set_tensor_address(name, ready.data_ptr())
        answers = []
        for name, dtype in self._outputs:
            answer = torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=dtype, device=self._device)
            self._context.set_tensor_address(name, answer.data_ptr())
            answers.append(answer)
        stream = torch.cuda.current_stream(self._device)
        self._context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        return tuple(answers)
